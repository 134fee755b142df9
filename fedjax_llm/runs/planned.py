"""The privacy plan of a run file, known before anything is trained."""

from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.runs import build
from fedjax_llm.runs.events import OnEvent, ignore
from fedjax_llm.runs.runfile import RunFile


def privacy_plan(run_file: RunFile, *, on_event: OnEvent = ignore) -> PrivacyPlan:
    """The plan that `run` would follow.

    For unit `example` the sampling rate depends on how many training rows each cloud has, so the
    data are read and tokenised exactly as a run does.

    Raises:
      UserError: data or model are missing or damaged.
      Refused: no epsilon can be certified for these settings.
    """
    if run_file.privacy.unit != "example":
        return build.plan(run_file, [])
    corpora = build.corpora(run_file, build.model(run_file, on_event), on_event)
    return build.plan(run_file, [rows for corpus in corpora for rows in corpus.client_rows])


def rounds_to_show(rounds: int, lines: int = 10) -> list[int]:
    """At most about `lines` rounds from the first to the last, evenly spaced.

    >>> rounds_to_show(4), rounds_to_show(100, 4)
    ([1, 2, 3, 4], [1, 25, 50, 75, 100])
    """
    step = max(1, rounds // lines)
    return sorted({1, rounds, *range(step, rounds + 1, step)})
