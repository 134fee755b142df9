"""Harmonising: from [harmonise] to rows that are ready to be divided, and the book kept of it."""

from collections.abc import Sequence

from fedjax_llm.data import Corpus, ReadRows
from fedjax_llm.data.harmonise import (
    Harmonise,
    LabelMap,
    LengthLimits,
    Likeness,
    Mix,
    check_agreement,
    drop_across,
    read_label_map,
)
from fedjax_llm.errors import UserError
from fedjax_llm.models import Tokenizer
from fedjax_llm.runs import text
from fedjax_llm.runs.events import Note, OnEvent
from fedjax_llm.runs.folder import RunFolder, harmonise_file
from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.harmonise import CloudHarmoniseSection, HarmoniseSection
from fedjax_llm.runs.sections.schema import RunFile

_LENGTHS = ("min_characters", "max_characters", "min_tokens", "max_tokens")


def likeness(section: HarmoniseSection, seed: int) -> Likeness:
    """When two rows are duplicates, the same at all clouds."""
    return Likeness(section.duplicates, section.compare, section.threshold, section.hashes, seed)


def harmonise(section: HarmoniseSection, own: CloudHarmoniseSection | None, seed: int) -> Harmonise:
    """What is done to the rows of one cloud.

    Args:
      section: Of the run.
      own: Of the cloud, or None.
      seed: Of the run.

    Raises:
      UserError: A file of labels that cannot be read, labels that contradict each other, a bound
        below another, or a cloud's label that is none of the common ones.
    """
    own = own or CloudHarmoniseSection()

    def chosen[T](mine: T | None, common: T) -> T:
        return common if mine is None else mine

    mix = chosen(own.mix, section.mix)
    return Harmonise(
        clean=chosen(own.clean, section.clean),
        labels=_labels(section, own),
        unknown_labels=chosen(own.unknown_labels, section.unknown_labels),
        lengths=LengthLimits(
            **{name: chosen(getattr(own, name), getattr(section, name)) for name in _LENGTHS}
        ),
        languages=chosen(own.languages, section.languages or ()),
        likeness=likeness(section, seed),
        mix=None if mix is None else Mix(mix.by, mix.temperature, mix.weights or {}, mix.repeat),
    )


def settings(run_file: RunFile) -> dict[str, Harmonise | None]:
    """What is done to the rows of each cloud; None without [harmonise].

    Raises:
      UserError: As `harmonise`; the message names the cloud.
    """
    found: dict[str, Harmonise | None] = {}
    for cloud in run_file.clouds:
        found[cloud.name] = None
        if run_file.harmonise is None:
            continue
        try:
            found[cloud.name] = harmonise(run_file.harmonise, cloud.harmonise, run_file.seed)
        except UserError as error:
            raise UserError(f"cloud {cloud.name!r}: {error}") from None
    return found


def check_tokenizers(run_file: RunFile, tokenizer: Tokenizer) -> None:
    """Checks the tokenizers that clouds declare against the base model's.

    Raises:
      UserError: A cloud declares another.
    """
    section = run_file.harmonise
    if section is not None:
        declared = {
            cloud.name: (cloud.harmonise and cloud.harmonise.tokenizer) or section.tokenizer
            for cloud in run_file.clouds
        }
        check_agreement({name: digest for name, digest in declared.items() if digest}, tokenizer)


def without_common(
    run_file: RunFile, clouds: dict[str, ReadRows], on_event: OnEvent
) -> dict[str, ReadRows]:
    """Divides the rows that several clouds hold among them, if the run file asks for it.

    Args:
      run_file: The settings.
      clouds: The rows of each cloud.
      on_event: Is told how many rows each meeting of two clouds took, and what it sent.

    Raises:
      UserError: A cloud is left with too few rows.
    """
    section = run_file.harmonise
    if section is None or section.across == "off":
        return clouds
    kept, steps, meetings = drop_across(
        {name: read.records for name, read in clouds.items()},
        likeness(section, run_file.seed),
        section.across,
    )
    for meeting in meetings:
        (one, two), (first, second) = meeting.clouds, meeting.lost
        sent = text.bytes_text(sum(map(len, meeting.messages)))
        on_event(
            Note(
                f"{one} and {two}: {first} of {one}'s rows and {second} of {two}'s are duplicates "
                f"that the other keeps; {sent} exchanged, none of it text"
            )
        )
    return {name: read.after(kept[name], [steps[name]]) for name, read in clouds.items()}


def privacy_statement(statement: str, run_file: RunFile) -> str:
    """What a plan protects, and which rows that is about where the run file had to choose."""
    section, unit = run_file.harmonise, run_file.privacy.unit
    if section is None or section.neighbours == "before" or unit == "none":
        return statement
    return (
        f"{statement} This is about the rows that harmonisation left: neighbouring data sets "
        f"differ by one {unit} of these. How one row decided which others were removed is not part "
        "of it."
    )


def record(folder: RunFolder, run_file: RunFile, corpora: Sequence[Corpus]) -> None:
    """Writes harmonise.json: every step at every cloud; nothing without [harmonise]."""
    if run_file.harmonise is None:
        return
    steps = {
        corpus.name: corpus.report.ledger.to_json()
        for corpus in corpora
        if corpus.report.ledger is not None
    }
    whole = corpora[0].report.whole
    harmonise_file.write(folder, steps, None if whole is None else whole.to_json())


def _labels(section: HarmoniseSection, own: CloudHarmoniseSection) -> LabelMap | None:
    common = _table(section)
    mine = _table(own)
    if not common and not mine:
        return None
    for label in mine:
        if common and label not in common:
            guess = toml_errors.nearest(label, common)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise UserError(
                f"labels: {label!r} is none of the common labels {', '.join(common)}{hint}"
            )
    return LabelMap(
        {label: (*common.get(label, ()), *mine.get(label, ())) for label in common or mine}
    )


def _table(section: HarmoniseSection | CloudHarmoniseSection) -> dict[str, tuple[str, ...]]:
    found = dict(section.labels or {})
    if section.labels_file is not None:
        for label, names in read_label_map(section.labels_file).labels.items():
            found[label] = (*found.get(label, ()), *names)
    return found
