"""The privacy plan of a run file, known before anything is trained."""

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.runs import build
from fedjax_llm.runs.events import OnEvent, ignore
from fedjax_llm.runs.sections.privacy import INTEGER
from fedjax_llm.runs.sections.schema import RunFile


def privacy_plan(run_file: RunFile, *, on_event: OnEvent = ignore) -> PrivacyPlan:
    """The plan that `run` would follow.

    For units `example` and `user` the sampling rate depends on how many training rows each cloud
    has, so the data are read and tokenised exactly as a run does. Integer noise depends on how many
    numbers the adapter has.

    Raises:
      UserError: data or model are missing or damaged.
      Refused: no epsilon can be certified for these settings.
    """
    privacy = run_file.privacy
    if privacy.unit in ("none", "client") and privacy.noise not in INTEGER:
        return build.plan(run_file, [])
    base = build.model(run_file, on_event)
    if privacy.unit == "client":
        return build.plan(run_file, [], base)
    corpora = build.corpora(run_file, base, on_event)
    if not build.schedule(run_file).timely:
        # How often a cloud looks at its data follows from the whole timeline.
        return build.federation(run_file, base, corpora, trial=True).plan
    return build.plan(run_file, [rows for corpus in corpora for rows in corpus.client_rows])


def answers(
    plan: PrivacyPlan, target: float | None = None, budget: float | None = None
) -> list[str]:
    """What `fedjax-llm epsilon` says about a plan below its statement.

    Args:
        plan: of the run.
        target: the epsilon for which a noise multiplier is looked for.
        budget: the epsilon for which rounds are looked for.

    Raises:
        UserError: no noise reaches the target; unit none has no epsilon.
    """
    if plan.unit == "none":
        if target is not None or budget is not None:
            raise UserError('unit "none" has no epsilon to aim for; set [privacy] unit')
        return []
    lines = [str(plan.report(rounds)) for rounds in rounds_to_show(plan.rounds)]
    if plan.budget is not None:
        lines.append(f"budget {plan.budget:g}: {plan.allowed_rounds} of {plan.rounds} rounds")
    if target is not None:
        found = plan.noise_for(target)
        lines.append(f"noise_multiplier = {found.noise_multiplier:.4g} for {found.report()}")
    if budget is not None:
        rounds = plan.rounds_within(budget)
        lines.append(f"{rounds} of {plan.rounds} rounds within epsilon {budget:g}")
    return lines + _table(plan)


def _table(plan: PrivacyPlan) -> list[str]:
    """Epsilon for half and twice the noise, the rate and the rounds."""
    noises = [plan.noise_multiplier * factor for factor in (0.5, 1.0, 2.0)]
    rounds = sorted({max(1, plan.rounds // 2), plan.rounds})
    if plan.correlation is None:  # made for these steps otherwise
        rounds.append(2 * plan.rounds)
    rates = (0.5, 1.0, 2.0) if plan.sampler.kind == "poisson" and plan.integer is None else (1.0,)
    rows = plan.epsilon_table(noises, rounds, rates)
    lines = ["", "noise   rate      " + "".join(f"{count:>12} rounds" for count in rounds)]
    for first in range(0, len(rows), len(rounds)):
        own = rows[first : first + len(rounds)]
        shown = [
            "none" if row.report.epsilon is None else f"{row.report.epsilon:.4f}" for row in own
        ]
        lines.append(
            f"{own[0].noise_multiplier:<7.4g} {own[0].rate:<9.4g} "
            + "".join(f"{text:>19}" for text in shown)
        )
    return lines


def rounds_to_show(rounds: int, lines: int = 10) -> list[int]:
    """At most about `lines` rounds from the first to the last, evenly spaced.

    >>> rounds_to_show(4), rounds_to_show(100, 4)
    ([1, 2, 3, 4], [1, 25, 50, 75, 100])
    """
    step = max(1, rounds // lines)
    return sorted({1, rounds, *range(step, rounds + 1, step)})
