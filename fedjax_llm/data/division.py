"""Division: one corpus divided among the clouds of a simulated federation.

What a cloud holds out must be new to all clouds, for they train one model. With groups that stay
whole (`Way.granularity`) every cloud holds out a part of its own, by group, as it does with data of
its own. With single rows a group may have rows in several clouds; then the held-out groups are
chosen once, over the whole corpus, and each cloud evaluates on what it has of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedjax_llm.data.cloud_records import ReadRows
from fedjax_llm.data.corpus_spec import CorpusSpec
from fedjax_llm.data.harmonise.ledger import Ledger, Step
from fedjax_llm.data.mapping import MappingReport
from fedjax_llm.data.partition import EmptyClient, Iid, Way, partition
from fedjax_llm.data.records import Record
from fedjax_llm.data.rendering import TextTokenizer, render
from fedjax_llm.data.splitting import group_key, split_by_group
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Division:
    """How a corpus is divided among clouds.

    Attributes:
      way: How.
      shares: A positive number for each cloud, such as its tokens per second, in the order of the
        clouds: the sizes to aim for. None is equal sizes, or those that the way draws.
      seed: Of the division; the corpus has its own for what is chosen and what is held out.
    """

    way: Way = field(default_factory=Iid)
    shares: tuple[float, ...] | None = None
    seed: int = 0


def divide_rows(
    whole: ReadRows,
    names: Sequence[str],
    division: Division,
    *,
    eval_fraction: float,
    seed: int,
    sizes: Sequence[int] | None = None,
) -> list[ReadRows]:
    """Divides the rows of a corpus among clouds.

    Args:
      whole: The rows, as `read_cloud` left them; where they are harmonised, so are the parts.
      names: Of K clouds, for messages.
      division: How.
      eval_fraction: Fraction to hold out, in (0, 1); matters here for single rows only.
      seed: Of what is held out.
      sizes: Size of each row, at least 1, such as `token_counts`; None counts rows.

    Returns:
      The rows of each cloud, for `load_corpus`. Their mapping counts what they were given.

    Raises:
      UserError: What `partition` cannot divide, a cloud that would come out empty by its name, or
        one without rows for training or evaluation.
    """
    records = whole.records
    way, shares = division.way, division.shares
    try:
        parts = partition(records, len(names), way, division.seed, shares=shares, sizes=sizes)
    except EmptyClient as error:
        cloud = names[error.client]
        raise UserError(f"cloud {cloud!r} would come out empty: {error.reason}") from error
    held_out = None
    if way.granularity == "rows":
        _, evaluation = split_by_group(records, eval_fraction, seed)
        held_out = frozenset(map(group_key, evaluation))
    found = []
    for part in parts:
        own = tuple(records[row] for row in part)
        ledger = None if whole.ledger is None else Ledger((Step("division", len(own)),))
        counts = MappingReport(rows=len(own), records=len(own))
        found.append(ReadRows(own, counts, 0, ledger, held_out, whole.ledger))
    return found


def token_counts(
    records: Sequence[Record], spec: CorpusSpec, tokenizer: TextTokenizer
) -> list[int]:
    """Tokens of each record as it is rendered; 1 for one that teaches nothing and is dropped."""
    style = (tokenizer, spec.template, spec.length, spec.system)
    rendered = [render(record, *style) for record in records]
    return [1 if example.cut == "all" else len(example.tokens) for example in rendered]
