"""Splitting by group: no question stands on both sides of training and evaluation."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError


def group_key(record: Record) -> str:
    """What must not straddle the split: the user, else the group, the prompt, or the text itself.

    Case and spacing do not make two questions different.
    """
    text = record.user or record.group or record.prompt or record.context or record.answer
    return " ".join(text.casefold().split())


def split_by_group(
    records: Sequence[Record], eval_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Splits records so that each group is wholly in training or wholly in evaluation.

    Groups are ordered by a keyed hash of their name (BLAKE2b), and taken for evaluation until the
    number of records is as close to `eval_fraction` as the next group allows. Which side a group
    falls on depends on the seed, on the groups and on their sizes, not on the order of the rows.

    Args:
      records: The records of one cloud.
      eval_fraction: Fraction of the records wanted for evaluation, in (0, 1).
      seed: Any integer.

    Returns:
      (training, evaluation), each in the order of `records`, neither of them empty.

    Raises:
      UserError: The fraction is out of range, or there are fewer than two groups.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise UserError(f"eval_fraction must be between 0 and 1, got {eval_fraction}")
    keys = [group_key(record) for record in records]
    sizes = Counter(keys)
    if not sizes:
        raise UserError("no record to split: every row is empty or was dropped; check the mapping")
    if len(sizes) == 1:
        raise UserError(
            f"all {len(records)} records form one group ({keys[0][:40]!r}), so they cannot be "
            f"split; add rows or set group in the mapping to a column that differs"
        )
    # Sorted by name as well, so that a collision of hashes cannot bring the row order back in.
    order = sorted(sizes, key=lambda key: (keyed_hash(key, seed), key))
    target = eval_fraction * len(records)
    chosen = {order[0]}
    count = sizes[order[0]]
    for key in order[1:-1]:
        if abs(count + sizes[key] - target) > abs(count - target):
            break
        chosen.add(key)
        count += sizes[key]
    train = [record for record, key in zip(records, keys, strict=True) if key not in chosen]
    evaluation = [record for record, key in zip(records, keys, strict=True) if key in chosen]
    return train, evaluation


def keyed_hash(text: str, seed: int) -> bytes:
    """A 16-byte hash of (seed, text) that is the same on every machine and Python version."""
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
