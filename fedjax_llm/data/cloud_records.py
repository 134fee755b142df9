"""One cloud's records before the split: its sources read, mapped, harmonised and limited."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedjax_llm.data.builtin import builtin_capacity, builtin_mapping, builtin_rows
from fedjax_llm.data.corpus_report import losses, missing
from fedjax_llm.data.corpus_spec import CorpusSpec
from fedjax_llm.data.harmonise.conversations import open_conversations
from fedjax_llm.data.harmonise.ledger import Ledger, Step
from fedjax_llm.data.harmonise.pipeline import harmonise_rows, limit_step, mapping_step
from fedjax_llm.data.mapping import MappingReport, map_rows_counted
from fedjax_llm.data.readers import read_rows
from fedjax_llm.data.records import Record
from fedjax_llm.data.rendering import TextTokenizer
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError

BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class ReadRows:
    """A cloud's records before the split.

    Attributes:
      records: What there is to train and evaluate on.
      mapping: What became of the rows that were read.
      over_limit: Records left out by `CorpusSpec.limit`.
      ledger: What harmonisation did; None without it.
      held_out: Groups for evaluation, where they are chosen for several clouds at once
        (`division.divide_rows`); None lets the cloud choose, by `CorpusSpec.eval_fraction`.
      whole: What harmonisation did to the corpus that these are a part of; None where they are not.
    """

    records: tuple[Record, ...]
    mapping: MappingReport
    over_limit: int = 0
    ledger: Ledger | None = None
    held_out: frozenset[str] | None = None
    whole: Ledger | None = None

    def lines(self) -> list[str]:
        """What was lost, as lines for the user."""
        return [
            *losses(self.mapping, self.over_limit, self.ledger),
            *(self.ledger.lines() if self.ledger else ()),
            *missing(self.mapping),
        ]

    def after(self, records: Sequence[Record], steps: Sequence[Step]) -> "ReadRows":
        """What further steps of harmonisation left of the records."""
        ledger = None if self.ledger is None else self.ledger + steps
        return replace(self, records=tuple(records), ledger=ledger)


def read_cloud(
    name: str, spec: CorpusSpec, tokenizer: TextTokenizer, root: Path | None = None
) -> ReadRows:
    """Reads, maps, harmonises and limits one cloud's rows: all that needs no other cloud.

    Args:
      name: Name of the cloud; every error begins with it.
      spec: What to read and how.
      tokenizer: Of the base model, for bounds in tokens.
      root: Folder that relative paths start from; None is the working directory.

    Raises:
      UserError: Any mistake in the spec or in the data, in one line that names the cloud.
    """
    try:
        return read_rows_of(spec, tokenizer, root)
    except UserError as error:
        raise UserError(f"cloud {name!r}: {error}") from error


def read_rows_of(spec: CorpusSpec, tokenizer: TextTokenizer, root: Path | None = None) -> ReadRows:
    """As `read_cloud`, of a corpus that belongs to no cloud yet.

    Raises:
      UserError: Any mistake in the spec or in the data, in one line.
    """
    records, counts = load_records(spec, root)
    steps = []
    if spec.harmonise is not None:
        records, found = harmonise_rows(records, spec.harmonise, tokenizer.encode)
        steps = [mapping_step(counts), *found]
    kept = _limited(records, spec)
    steps += limit_step(len(records), len(kept))
    return ReadRows(
        records=tuple(kept),
        mapping=counts,
        over_limit=len(records) - len(kept),
        ledger=None if spec.harmonise is None else Ledger(tuple(steps)),
    )


def load_records(spec: CorpusSpec, root: Path | None = None) -> tuple[list[Record], MappingReport]:
    """Reads and maps all sources of a spec, in their order, before `limit` is applied.

    Raises:
      UserError: No source, an unreadable source, or a mapping that does not fit it.
    """
    if not spec.sources:
        raise UserError("no source; name a file, a folder or builtin:<corpus>")
    records: list[Record] = []
    reports = []
    for source in spec.sources:
        if source.startswith(BUILTIN_PREFIX):
            corpus = source.removeprefix(BUILTIN_PREFIX)
            rows = builtin_rows(corpus, builtin_capacity(corpus), spec.seed)
            mapping = spec.mapping or builtin_mapping(corpus)
        else:
            rows = open_conversations(read_rows((root or Path()) / source))
            if spec.mapping is None:
                raise UserError(
                    f"{source}: needs a mapping from its columns ({', '.join(rows[0])}); "
                    f"set at least answer"
                )
            mapping = spec.mapping
        try:
            mapped, report = map_rows_counted(rows, mapping)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if not mapping.source:
            name = source if source.startswith(BUILTIN_PREFIX) else Path(source).name
            mapped = [replace(record, source=name) for record in mapped]
        records += mapped
        reports.append(report)
    return records, _total(reports)


def _limited(records: list[Record], spec: CorpusSpec) -> list[Record]:
    if spec.limit is None:
        return records
    if spec.limit < 1:
        raise UserError(f"limit must be at least 1, got {spec.limit}")
    if spec.limit > len(records) and any(s.startswith(BUILTIN_PREFIX) for s in spec.sources):
        raise UserError(
            f"limit = {spec.limit}, but the embedded corpora give {len(records)} distinct records; "
            f"lower limit"
        )
    order = sorted(range(len(records)), key=lambda index: keyed_hash(str(index), spec.seed))
    return [records[index] for index in order[: spec.limit]]


def _total(reports: Sequence[MappingReport]) -> MappingReport:
    missing: Counter[str] = Counter()
    for report in reports:
        missing.update(report.missing)
    return MappingReport(
        rows=sum(report.rows for report in reports),
        records=sum(report.records for report in reports),
        empty_answers=sum(report.empty_answers for report in reports),
        empty_prompts=sum(report.empty_prompts for report in reports),
        missing=dict(missing),
    )
