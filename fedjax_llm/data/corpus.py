"""Corpus: one cloud's data, from files or the package to batches for training and evaluation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedjax_llm.data.builtin import builtin_capacity, builtin_mapping, builtin_rows
from fedjax_llm.data.harmonise.conversations import open_conversations
from fedjax_llm.data.harmonise.ledger import Ledger, Step
from fedjax_llm.data.harmonise.pipeline import (
    Harmonise,
    harmonise_rows,
    harmonise_sides,
    limit_step,
    mapping_step,
)
from fedjax_llm.data.mapping import Mapping, MappingReport, map_rows_counted
from fedjax_llm.data.packing import to_batch, to_batch_by_user
from fedjax_llm.data.partition import Iid, Way, partition
from fedjax_llm.data.poisoning import flip_labels
from fedjax_llm.data.readers import read_rows
from fedjax_llm.data.records import Record
from fedjax_llm.data.rendering import RenderReport, TextTokenizer, render_all
from fedjax_llm.data.splitting import group_key, keyed_hash, split_by_group
from fedjax_llm.data.statistics import TokenStatistics, describe
from fedjax_llm.errors import UserError
from fedjax_llm.models.batch import Batch

BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class CorpusSpec:
    """What a cloud trains on, as its part of the run file says.

    Attributes:
      sources: Paths, or embedded corpora such as "builtin:medical"; concatenated.
      mapping: From columns to records; None is for embedded corpora only, which know their own.
      limit: Use this many records after a shuffle by `seed`; None uses all.
      eval_fraction: Fraction of the records kept for evaluation, in (0, 1).
      template: "chat" or "plain".
      system: System message of every example, or None for the template's default.
      length: Tokens per row.
      packing: Several examples per row; must be False where an example is the unit of privacy.
      by_user: One training row a user, which is the unit of privacy; goes with one client.
      seed: Of the embedded corpora, the shuffle and the split.
      clients: Among how many clients of the cloud the training rows are divided.
      partition: How they are divided; see `partition.partition`.
      flipped: Whether the training answers are those of a label-flip attack.
      harmonise: What is done to the rows before they are divided; None does nothing.
    """

    sources: tuple[str, ...]
    mapping: Mapping | None = None
    limit: int | None = None
    eval_fraction: float = 0.1
    template: str = "chat"
    system: str | None = None
    length: int = 256
    packing: bool = False
    by_user: bool = False
    seed: int = 0
    clients: int = 1
    partition: Way = field(default_factory=Iid)
    flipped: bool = False
    harmonise: Harmonise | None = None


@dataclass(frozen=True)
class CorpusReport:
    """Where every row of a cloud went; no row disappears uncounted.

    `mapping.rows` = dropped by the mapping + `over_limit` + training and evaluation records.
    `over_row` of the training records did not fit into their users' rows. `ledger` has every step
    of harmonisation, from the rows read to the records for training and evaluation; None without.
    Where one corpus was divided among clouds, `whole` is its ledger, and `ledger` begins after it.
    """

    mapping: MappingReport
    over_limit: int
    train_rendering: RenderReport
    evaluation_rendering: RenderReport
    train: TokenStatistics
    evaluation: TokenStatistics
    over_row: int = 0
    ledger: Ledger | None = None
    whole: Ledger | None = None

    def lines(self) -> list[str]:
        """The report as lines for the user; lines about losses appear only where there are some."""
        losses = _losses(self) | {
            "contexts shortened to fit": self._both("context_cut"),
            "answers shortened to fit": self._both("answer_cut"),
            "records dropped because no token of the answer fits": self._both("lost"),
            "training examples left out because their user's row is full": self.over_row,
        }
        return [
            f"training: {self.train}",
            f"evaluation: {self.evaluation}",
            *(f"{count} {what}" for what, count in losses.items() if count),
            *(self.ledger.lines() if self.ledger else ()),
            *_missing(self.mapping),
        ]

    def _both(self, name: str) -> int:
        return sum(getattr(r, name) for r in (self.train_rendering, self.evaluation_rendering))


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
            *(f"{count} {what}" for what, count in _losses(self).items() if count),
            *(self.ledger.lines() if self.ledger else ()),
            *_missing(self.mapping),
        ]

    def after(self, records: Sequence[Record], steps: Sequence[Step]) -> "ReadRows":
        """What further steps of harmonisation left of the records."""
        ledger = None if self.ledger is None else self.ledger + steps
        return replace(self, records=tuple(records), ledger=ledger)


@dataclass(frozen=True)
class Corpus:
    """A cloud's data, ready for training.

    Attributes:
      name: The cloud.
      train: Rows [N, length] for training (numpy), those of one client after those of another.
      client_rows: How many of them belong to each client.
      client_records: How many of `train_records` belong to each client; not `client_rows` with
        packing, with users as units, or where rendering lost some.
      evaluation: Rows [N, length] for evaluation (numpy); shares no group with `train`.
      train_records: The records behind `train`, before rendering.
      evaluation_records: The records behind `evaluation`, for example to generate from.
      report: Where every row went.
    """

    name: str
    train: Batch
    client_rows: tuple[int, ...]
    client_records: tuple[int, ...]
    evaluation: Batch
    train_records: tuple[Record, ...]
    evaluation_records: tuple[Record, ...]
    report: CorpusReport


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


def load_corpus(
    name: str,
    spec: CorpusSpec,
    tokenizer: TextTokenizer,
    pad_id: int,
    root: Path | None = None,
    read: ReadRows | None = None,
) -> Corpus:
    """Reads, maps, harmonises, limits, splits, renders and batches one cloud's data.

    Args:
      name: Name of the cloud; every error begins with it.
      spec: What to read and how.
      tokenizer: Tokenizer of the base model.
      pad_id: Token of the padding.
      root: Folder that relative paths start from; None is the working directory.
      read: The rows, where `read_cloud` has read them already; None reads them.

    Raises:
      UserError: Any mistake in the spec or in the data, in one line that names the cloud.
    """
    read = read or read_cloud(name, spec, tokenizer, root)
    try:
        if spec.by_user and spec.clients > 1:
            raise UserError(
                f"{spec.clients} clients would share the examples of one user; "
                "use one client a cloud with unit user"
            )
        if spec.by_user and not (spec.mapping and spec.mapping.user):
            raise UserError(
                "privacy unit user needs to know whose each row is; set user in the mapping to the "
                "column that tells"
            )
        train_records, evaluation_records = _split(read, spec)
        ledger = read.ledger
        if spec.harmonise is not None and ledger is not None:
            train_records, evaluation_records, steps = harmonise_sides(
                train_records, evaluation_records, spec.harmonise, spec.seed
            )
            ledger += steps
        style = (tokenizer, spec.template, spec.length, spec.system)
        if spec.flipped:
            train_records = flip_labels(train_records, spec.seed)
        train_records, counts_by_client = _divided(train_records, spec)
        train, train_counts = render_all(train_records, *style)
        evaluation, evaluation_counts = render_all(evaluation_records, *style)
        for side, examples in (("training", train), ("evaluation", evaluation)):
            if not examples:
                raise UserError(
                    f"no {side} example fits into {spec.length} tokens with a token of its answer; "
                    f"raise length"
                )
        batches = []
        for first, count in counts_by_client:
            own = train
            if spec.clients > 1:
                own, _ = render_all(train_records[first : first + count], *style)
            if not own:
                raise UserError(
                    f"a client of {spec.clients} has no training example that fits into "
                    f"{spec.length} tokens; use fewer clients, or raise length"
                )
            if spec.by_user:
                batch, over_row = to_batch_by_user(own, spec.length, pad_id)
            else:
                batch, over_row = to_batch(own, spec.length, spec.packing, pad_id), 0
            batches.append(batch)
        return Corpus(
            name=name,
            train=Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True))),
            client_rows=tuple(len(batch.tokens_BxT) for batch in batches),
            client_records=tuple(count for _, count in counts_by_client),
            evaluation=to_batch(evaluation, spec.length, spec.packing, pad_id),
            train_records=tuple(train_records),
            evaluation_records=tuple(evaluation_records),
            report=CorpusReport(
                mapping=read.mapping,
                over_limit=read.over_limit,
                train_rendering=train_counts,
                evaluation_rendering=evaluation_counts,
                train=describe(train),
                evaluation=describe(evaluation),
                over_row=over_row,
                ledger=ledger,
                whole=read.whole,
            ),
        )
    except UserError as error:
        raise UserError(f"cloud {name!r}: {error}") from error


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


def _split(read: ReadRows, spec: CorpusSpec) -> tuple[list[Record], list[Record]]:
    """Training and evaluation records."""
    if read.held_out is None:
        return split_by_group(read.records, spec.eval_fraction, spec.seed)
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in read.records:
        sides[group_key(record) in read.held_out].append(record)
    for side, own in zip(("training", "evaluation"), sides, strict=True):
        if not own:
            raise UserError(
                f"none of the {len(read.records)} records is for {side}, since what single rows "
                f"hold out is chosen for all clouds at once; change eval_fraction, or use "
                f"granularity = 'groups'"
            )
    return sides


def _divided(records: list[Record], spec: CorpusSpec) -> tuple[list[Record], list[tuple[int, int]]]:
    """The records in the order of the clients, and where each client's begin and how many."""
    if spec.clients == 1:
        return records, [(0, len(records))]
    parts = partition(records, spec.clients, spec.partition, spec.seed)
    sizes = [len(indices) for indices in parts]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    ordered = [records[index] for indices in parts for index in indices]
    return ordered, list(zip(starts, sizes, strict=True))


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


def _losses(report: CorpusReport | ReadRows) -> dict[str, int]:
    """Rows lost before the split; a ledger has them in its own words."""
    if report.ledger:
        return {}
    return {
        "rows dropped because the answer is empty": report.mapping.empty_answers,
        "rows dropped because the prompt is empty": report.mapping.empty_prompts,
        "records left out by limit": report.over_limit,
    }


def _missing(mapping: MappingReport) -> list[str]:
    return [f"{count} rows without {column!r}" for column, count in mapping.missing.items()]


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
