"""Duplicates inside a cloud: of texts that say the same, one stays.

Exact duplicates are the same text. Near duplicates are equal but for case and spacing, or have a
Jaccard similarity of their shingles of at least a threshold: MinHash bands find the candidates, the
exact similarity decides.

Rows are visited in the order of a keyed hash of their whole content, and a row stays unless one
that stays already is its duplicate. So which rows stay does not depend on their order in the file,
and two things hold that connected components would not give: no two rows that stay are duplicates,
and each row that goes is a duplicate of one that stays. The first holds for near duplicates up to
the recall of the bands, `RECALL` or more for every pair; the second always.

What privacy this costs: exact duplicates become a set of texts, which one row more changes by one
text or not at all. Removing near duplicates makes a row depend on others: one more row can push out
its likenesses, and which of them stay can change from there on without a bound, so a guarantee per
example or user no longer covers the rows as they were read (arXiv 2309.05610, on deduplication as a
side channel). Run files refuse that, or say what is covered instead.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.harmonise.minhash import band_keys, choose_bands, signatures
from fedjax_llm.data.harmonise.shingles import (
    Compare,
    compared_text,
    content_of,
    exact_text,
    shingle,
)
from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError

Kind = Literal["off", "exact", "near"]

# The least probability with which the bands find a pair of near duplicates.
RECALL = 0.999


@dataclass(frozen=True)
class Likeness:
    """When two rows are duplicates; the same for all clouds of a run.

    Attributes:
      kind: "off", "exact" or "near".
      compare: What is compared; see `shingles.compared_text`.
      threshold: Least Jaccard similarity of near duplicates, in (0, 1].
      hashes: K of MinHash, in [1, 1024].
      seed: Public; of the hash functions and of the order in which rows are visited.
    """

    kind: Kind = "exact"
    compare: Compare = "record"
    threshold: float = 0.8
    hashes: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Duplicates:
    """Which rows are duplicates of which.

    Attributes:
      of_N: For each row the row that stays in its place, int64; -1 for the rows that stay.
      exact_N: Whether a row that goes is an exact duplicate of that one, bool.
    """

    of_N: np.ndarray
    exact_N: np.ndarray

    @property
    def kept(self) -> list[int]:
        """The rows that stay, ascending."""
        return [int(row) for row in np.flatnonzero(self.of_N < 0)]


def find_duplicates(records: Sequence[Record], likeness: Likeness) -> Duplicates:
    """Finds the rows of one cloud that are duplicates of another row of it.

    Args:
      records: N records.
      likeness: When two are duplicates.

    Returns:
      For each row, which other one stays in its place.

    Raises:
      UserError: A threshold or a number of hashes out of range.
    """
    of_N = np.full(len(records), -1, np.int64)
    exact_N = np.zeros(len(records), np.bool_)
    if likeness.kind == "off" or not records:
        return Duplicates(of_N, exact_N)
    exact = [exact_text(record, likeness.compare) for record in records]
    texts = exact
    if likeness.kind == "near":
        texts = [compared_text(record, likeness.compare) for record in records]
    first: dict[str, int] = {}
    for row in _order(records, likeness.seed):
        stays = first.setdefault(texts[row], row)
        if stays != row:
            of_N[row] = stays
    if likeness.kind == "near":
        distinct = list(first.values())
        near = _near([texts[row] for row in distinct], likeness)
        for row, other in zip(distinct, near, strict=True):
            if other is not None:
                of_N[row] = distinct[other]
        # A copy of a row that went as a near duplicate goes in favour of the same row.
        chained = np.flatnonzero((of_N >= 0) & (of_N[of_N] >= 0))
        of_N[chained] = of_N[of_N[chained]]
    for row in np.flatnonzero(of_N >= 0).tolist():
        exact_N[row] = exact[row] == exact[of_N[row]]
    return Duplicates(of_N, exact_N)


def drop_duplicates(
    records: Sequence[Record], likeness: Likeness
) -> tuple[list[Record], list[Step]]:
    """Leaves one of each set of duplicates.

    Args:
      records: N records of one cloud.
      likeness: When two are duplicates; with kind "off" all stay.

    Returns:
      The rows that stay in their order, and the count.

    Raises:
      UserError: All rows are duplicates of one.
    """
    if likeness.kind == "off":
        return list(records), []
    found = find_duplicates(records, likeness)
    if len(records) > 1 and len(found.kept) == 1:
        stays = records[found.kept[0]]
        raise UserError(
            f"all {len(records)} rows are duplicates of {(stays.prompt or stays.answer)[:40]!r}, "
            'which leaves one and nothing to evaluate on; add rows, or set duplicates = "off"'
        )
    gone = found.of_N >= 0
    dropped = {
        "exact duplicates": int((gone & found.exact_N).sum()),
        "near duplicates": int((gone & ~found.exact_N).sum()),
    }
    step = Step("duplicates inside the cloud", len(records), counted(dropped))
    return [records[row] for row in found.kept], [step]


def _order(records: Sequence[Record], seed: int) -> list[int]:
    """Rows by a keyed hash of their whole content; rows that are wholly equal by position."""
    keys = [keyed_hash(f"duplicate\0{content_of(record)}", seed) for record in records]
    return sorted(range(len(records)), key=lambda row: keys[row])


def _near(texts: Sequence[str], likeness: Likeness) -> list[int | None]:
    """For each of distinct texts, in the order of visit, the earlier one that stays, or None."""
    bands = choose_bands(likeness.hashes, likeness.threshold, RECALL)
    shingles = shingle(texts)
    keys_NxB = band_keys(signatures(shingles, likeness.hashes, likeness.seed), bands)
    # Only rows that stay stand in the buckets, so that a crowd of copies costs no more than a pair.
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    found: list[int | None] = []
    for row, keys in enumerate(keys_NxB.tolist()):
        places = list(enumerate(keys))
        candidates = dict.fromkeys(other for place in places for other in buckets.get(place, ()))
        stays = next(
            (c for c in candidates if shingles.jaccard(row, c) >= likeness.threshold), None
        )
        found.append(stays)
        if stays is None:
            for place in places:
                buckets[place].append(row)
    return found
