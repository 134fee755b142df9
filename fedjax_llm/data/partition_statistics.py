"""Statistics of a partition: who holds how much, and how far each client is from the whole.

Letters: K clients, L labels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import group_key


@dataclass(frozen=True)
class ClientStatistics:
    """What one client holds.

    Attributes:
      name: Of the client.
      rows: Its records.
      tokens: Tokens in them; None where they are not rendered.
      labels: Records of each label, the commonest of the whole first; without labels it holds none.
      js_bits: Jensen-Shannon divergence of its labels from those of the whole, in [0, 1] bits.
      total_variation: Total variation distance of the two, in [0, 1].
      effective_labels: 2 to the entropy of its labels: from 1, one label only, to the number of
        labels, all equally often.
      groups: Distinct groups (`splitting.group_key`) that it has rows of.
      shared_groups: How many of these another client has rows of, too.

    The three distances are NaN for a client without rows.
    """

    name: str
    rows: int
    tokens: int | None
    labels: Mapping[str, int]
    js_bits: float
    total_variation: float
    effective_labels: float
    groups: int
    shared_groups: int


@dataclass(frozen=True)
class PartitionStatistics:
    """How a set of records is divided.

    Attributes:
      clients: One for each client, in order.
      labels: Records of each label in the whole, the commonest first; the empty text stands for
        records without one.
      effective_labels: Of the whole, as of a client.
      label_bits: Mutual information of a row's client and its label, in bits: what knowing who
        holds a row tells about its label. 0 when all clients are alike; at most the entropy of the
        labels, when every label is with one client.
      gini: Gini coefficient of the clients' sizes, in [0, (K - 1) / K]; 0 when all are equal.
      largest: Size of the largest client over the mean size.
      shared_groups: Groups that more than one client has rows of.
      in_tokens: Whether `gini` and `largest` measure tokens; rows otherwise.
    """

    clients: tuple[ClientStatistics, ...]
    labels: Mapping[str, int]
    effective_labels: float
    label_bits: float
    gini: float
    largest: float
    shared_groups: int
    in_tokens: bool

    @property
    def has_labels(self) -> bool:
        """Whether any record has a label."""
        return any(self.labels)


def partition_statistics(
    names: Sequence[str],
    records: Sequence[Sequence[Record]],
    tokens: Sequence[int] | None = None,
) -> PartitionStatistics:
    """Describes a partition.

    Args:
      names: Of K clients.
      records: Of each client, K sequences.
      tokens: Of each client, K numbers; None where the records are not rendered.

    Raises:
      ValueError: No client, no record, or sequences that differ in length.
    """
    if not len(names) == len(records) == len(names if tokens is None else tokens):
        raise ValueError("names, records and tokens must have one element for each client")
    whole = Counter(record.label for own in records for record in own)
    if not whole:
        raise ValueError("a partition of no records has no statistics")
    # Counter keeps the order of the records among equals, which a partition may change.
    order = sorted(whole, key=lambda label: (-whole[label], label))
    counts = [Counter(record.label for record in own) for own in records]
    count_KxL = np.array([[own[label] for label in order] for own in counts], np.float64)
    groups = [{group_key(record) for record in own} for own in records]
    holders = Counter(group for own in groups for group in own)
    share_L = count_KxL.sum(axis=0) / count_KxL.sum()
    clients = []
    for client, name in enumerate(names):
        rows = len(records[client])
        own_L = count_KxL[client] / rows if rows else np.full(len(order), np.nan)
        clients.append(
            ClientStatistics(
                name=name,
                rows=rows,
                tokens=None if tokens is None else int(tokens[client]),
                labels={label: counts[client][label] for label in order if counts[client][label]},
                js_bits=js_bits(own_L, share_L),
                total_variation=total_variation(own_L, share_L),
                effective_labels=2.0 ** entropy_bits(own_L),
                groups=len(groups[client]),
                shared_groups=sum(holders[group] > 1 for group in groups[client]),
            )
        )
    sizes = [len(own) for own in records] if tokens is None else tokens
    inside = sum(c.rows * np.log2(c.effective_labels) for c in clients if c.rows)
    return PartitionStatistics(
        clients=tuple(clients),
        labels={label: whole[label] for label in order},
        effective_labels=2.0 ** entropy_bits(share_L),
        # Rounding would leave a partition into equal clients at -1e-16.
        label_bits=max(0.0, entropy_bits(share_L) - inside / whole.total()),
        gini=gini(sizes),
        largest=max(sizes) * len(sizes) / sum(sizes),
        shared_groups=sum(count > 1 for count in holders.values()),
        in_tokens=tokens is not None,
    )


def entropy_bits(p_L: np.ndarray) -> float:
    """Entropy of a distribution in bits; NaN where it holds NaN.

    >>> entropy_bits(np.array([0.5, 0.25, 0.25, 0.0]))
    1.5
    """
    return float(-np.sum(p_L * np.log2(np.where(p_L == 0, 1.0, p_L))))


def js_bits(p_L: np.ndarray, q_L: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions in bits, in [0, 1].

    Lin, Divergence measures based on the Shannon entropy (IEEE Transactions on Information Theory
    37, 1991), section 4, with equal weights.

    >>> js_bits(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    both = entropy_bits((p_L + q_L) / 2) - (entropy_bits(p_L) + entropy_bits(q_L)) / 2
    return float(np.clip(both, 0.0, 1.0))


def total_variation(p_L: np.ndarray, q_L: np.ndarray) -> float:
    """Half the l1 distance of two distributions: the most that they differ about any set of labels.

    >>> total_variation(np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5]))
    0.5
    """
    return float(np.abs(p_L - q_L).sum() / 2)


def gini(sizes: Sequence[float]) -> float:
    """Gini coefficient: the mean difference of two sizes, over twice the mean size.

    >>> gini([1, 1, 1]), gini([0, 0, 3])
    (0.0, 0.6666666666666666)
    """
    size_K = np.sort(np.asarray(sizes, np.float64))
    count = len(size_K)
    # The r-th smallest of K counts r - 1 times with plus and K - r times with minus.
    weight_K = 2 * np.arange(1, count + 1) - count - 1
    return float(weight_K @ size_K / (count * size_K.sum()))
