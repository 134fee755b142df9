"""Corpus: one cloud's data, from files or the package to batches for training and evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_llm.data.cloud_records import ReadRows, read_cloud
from fedjax_llm.data.corpus_report import CorpusReport
from fedjax_llm.data.corpus_spec import CorpusSpec
from fedjax_llm.data.harmonise.pipeline import harmonise_sides
from fedjax_llm.data.packing import to_batch, to_batch_by_user
from fedjax_llm.data.partition import partition
from fedjax_llm.data.poisoning import flip_labels
from fedjax_llm.data.records import Record
from fedjax_llm.data.rendering import TextTokenizer, render_all
from fedjax_llm.data.splitting import group_key, split_by_group
from fedjax_llm.data.statistics import describe
from fedjax_llm.errors import UserError
from fedjax_llm.models.batch import Batch


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
        return _made(name, spec, tokenizer, pad_id, read)
    except UserError as error:
        raise UserError(f"cloud {name!r}: {error}") from error


def _made(
    name: str, spec: CorpusSpec, tokenizer: TextTokenizer, pad_id: int, read: ReadRows
) -> Corpus:
    _check_users(spec)
    train_records, evaluation_records = _split(read, spec)
    ledger = read.ledger
    if spec.harmonise is not None and ledger is not None:
        train_records, evaluation_records, steps = harmonise_sides(
            train_records, evaluation_records, spec.harmonise, spec.seed
        )
        ledger += steps
    if spec.flipped:
        train_records = flip_labels(train_records, spec.seed)
    train_records, places = _divided(train_records, spec)
    style = (tokenizer, spec.template, spec.length, spec.system)
    train, train_counts = render_all(train_records, *style)
    evaluation, evaluation_counts = render_all(evaluation_records, *style)
    for side, examples in (("training", train), ("evaluation", evaluation)):
        if not examples:
            raise UserError(
                f"no {side} example fits into {spec.length} tokens with a token of its answer; "
                f"raise length"
            )
    batches, over_row = [], 0
    for first, count in places:
        own = train
        if spec.clients > 1:
            own, _ = render_all(train_records[first : first + count], *style)
        if not own:
            raise UserError(
                f"a client of {spec.clients} has no training example that fits into "
                f"{spec.length} tokens; use fewer clients, or raise length"
            )
        if spec.by_user:
            # There is one client, see `_check_users`.
            batch, over_row = to_batch_by_user(own, spec.length, pad_id)
        else:
            batch = to_batch(own, spec.length, spec.packing, pad_id)
        batches.append(batch)
    return Corpus(
        name=name,
        train=Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True))),
        client_rows=tuple(len(batch.tokens_BxT) for batch in batches),
        client_records=tuple(count for _, count in places),
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


def _check_users(spec: CorpusSpec) -> None:
    """Refuses users as units whose rows several clients would share, or of whom nothing is said."""
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
