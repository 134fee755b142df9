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
from fedjax_llm.errors import UserError


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


def harmonise_sides(
    train: Sequence[Record], evaluation: Sequence[Record], settings: Harmonise, seed: int
) -> tuple[list[Record], list[Record], list[Step]]:
    """What is done after the split: no text is on both sides, then the training rows are mixed.

    Groups decide the split, and rows of one text can be in two groups or belong to two users; so
    equal texts are looked for once more, whatever `likeness` says. They leave evaluation, not
    training: one row more in evaluation must not take rows from training, which a privacy plan
    protects one by one.

    Args:
      train: Training rows.
      evaluation: Evaluation rows.
      settings: What to do.
      seed: Of the mixing.

    Returns:
      Training rows, evaluation rows, and the steps, whose counts include both.

    Raises:
      UserError: All evaluation rows are in training too.
    """
    compare = settings.likeness.compare
    trained = {compared_text(record, compare) for record in train}
    held_out = [row for row in evaluation if compared_text(row, compare) not in trained]
    if evaluation and not held_out:
        raise UserError(
            f"all {len(evaluation)} evaluation rows are in training too: they are copies of each "
            "other; set group in the mapping, so that copies stay together, or drop duplicates"
        )
    steps = []
    if len(held_out) < len(evaluation):
        dropped = {"evaluation rows that are in training too": len(evaluation) - len(held_out)}
        steps.append(Step("split", len(train) + len(evaluation), dropped))
    rows = list(train)
    if settings.mix is not None:
        rows, found = mix_records(rows, settings.mix, seed)
        extra = len(held_out)
        steps += [
            Step(s.name, s.rows_in + extra, s.dropped, s.changed, s.added, s.note) for s in found
        ]
    return rows, held_out, steps
