"""Pipeline: the steps of one cloud in their order.

    mapping -> cleaning -> labels -> length -> language -> duplicates -> limit -> other clouds
            -> split -> mixing of the training rows

Cleaning comes first because what is equal after it should count as equal everywhere; filters come
before duplicates so that no row is lost to another one that a filter then takes away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedjax_llm.data.harmonise.cleaning import clean_records
from fedjax_llm.data.harmonise.duplicates import Likeness, drop_duplicates
from fedjax_llm.data.harmonise.labels import LabelMap, Unknown, align_labels
from fedjax_llm.data.harmonise.languages import filter_languages
from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.harmonise.lengths import LengthLimits, filter_lengths
from fedjax_llm.data.harmonise.mixing import Mix, mix_records
from fedjax_llm.data.harmonise.shingles import compared_text
from fedjax_llm.data.mapping import MappingReport
from fedjax_llm.data.records import Record


@dataclass(frozen=True)
class Harmonise:
    """What is done to the rows of one cloud. The default loses no information.

    Attributes:
      clean: Whether texts are cleaned; see `cleaning`.
      labels: The common labels; None leaves labels alone.
      unknown_labels: What becomes of labels that the map does not know.
      lengths: Rows outside are dropped.
      languages: Rows in other languages are dropped; empty keeps all.
      likeness: Which rows are duplicates; the same at all clouds.
      mix: Shares of the domains among the training rows; None leaves them.
    """

    clean: bool = True
    labels: LabelMap | None = None
    unknown_labels: Unknown = "refuse"
    lengths: LengthLimits = field(default_factory=LengthLimits)
    languages: tuple[str, ...] = ()
    likeness: Likeness = field(default_factory=Likeness)
    mix: Mix | None = None


def mapping_step(report: MappingReport) -> Step:
    """The first step of a ledger: what the mapping made of the rows that were read."""
    dropped = {"empty answer": report.empty_answers, "empty prompt": report.empty_prompts}
    return Step("mapping", report.rows, counted(dropped))


def limit_step(rows: int, kept: int) -> list[Step]:
    """The step of a limit, if it took anything away."""
    return [Step("limit", rows, {"over the limit": rows - kept})] if kept < rows else []


def harmonise_rows(
    records: Sequence[Record],
    settings: Harmonise,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> tuple[list[Record], list[Step]]:
    """Does to the rows of one cloud what can be done without the others.

    Args:
      records: Its rows, as `map_rows` left them.
      settings: What to do.
      encode: From a text to token ids; needed for bounds in tokens only.

    Returns:
      The rows that stay in their order, and one step for each thing that was done.

    Raises:
      UserError: Unknown labels or languages, or all rows are duplicates of one.
    """
    rows, steps = list(records), list[Step]()
    if settings.clean:
        rows, step = clean_records(rows)
        steps.append(step)
    if settings.labels is not None:
        rows, step = align_labels(rows, settings.labels, settings.unknown_labels)
        steps.append(step)
    if settings.lengths != LengthLimits():
        rows, step = filter_lengths(rows, settings.lengths, encode)
        steps.append(step)
    if settings.languages:
        rows, step = filter_languages(rows, settings.languages)
        steps.append(step)
    rows, found = drop_duplicates(rows, settings.likeness)
    return rows, steps + found


def harmonise_training(
    train: Sequence[Record], evaluation: Sequence[Record], settings: Harmonise, seed: int
) -> tuple[list[Record], list[Step]]:
    """What is done to training rows after the split: none is in evaluation too, then mixing.

    Groups decide the split, and rows of one text can be in two groups or belong to two users; so
    equal texts are looked for once more, whatever `likeness` says.

    Args:
      train: Training rows.
      evaluation: Evaluation rows; they stay as they are.
      settings: What to do.
      seed: Of the mixing.

    Returns:
      The training rows, and the steps, whose counts include the evaluation rows.
    """
    held_out = {compared_text(record, settings.likeness.compare) for record in evaluation}
    rows = [r for r in train if compared_text(r, settings.likeness.compare) not in held_out]
    steps = []
    if len(rows) < len(train):
        dropped = {"training rows that are in evaluation too": len(train) - len(rows)}
        steps.append(Step("split", len(train), dropped))
    if settings.mix is not None:
        rows, found = mix_records(rows, settings.mix, seed)
        steps += found
    extra = len(evaluation)
    return rows, [
        Step(s.name, s.rows_in + extra, s.dropped, s.changed, s.added, s.note) for s in steps
    ]
