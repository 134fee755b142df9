"""Shards: rows sorted by label are cut into equal pieces, of which every client gets a few.

Letters: N rows, K clients, S shards of a client, G groups.
"""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.partition.dealing import check_clients, generator, indices, unit_sizes
from fedjax_llm.data.partition.dirichlet import groups_by_label
from fedjax_llm.errors import UserError


def by_shards(
    labels: Sequence[str],
    groups: Sequence[str] | None,
    clients: int,
    shards: int,
    seed: int,
    *,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides rows so that a client has few labels: S shards of rows sorted by label.

    The rows stand by label, within a label in a random order, and are cut into K S shards of equal
    size, which are dealt at random, S to a client (arXiv 1602.05629, section 3, with K = 100 and
    S = 2). A client then has at most 2 S labels where every label fills a shard. A group goes to
    the shard that holds its middle, and counts under a label as in `dirichlet.dirichlet`; single
    rows of size 1 make shards that differ by at most one row.

    Args:
      labels: Label of each of N rows; the empty text is a label like any other.
      groups: Group of each row, which stays whole; None makes every row its own group.
      clients: K, number of clients, at least 1.
      shards: S, shards of a client, at least 1.
      seed: Any integer.
      sizes: Size of each row, at least 1, such as its tokens; None counts rows.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: A number out of range, or a shard that would come out empty.
    """
    check_clients(len(labels), clients)
    if shards < 1:
        raise UserError(f"shards must be at least 1 for each client, got {shards}")
    names = [str(row) for row in range(len(labels))] if groups is None else groups
    size_of = unit_sizes(names, sizes)
    line = [name for own in groups_by_label(labels, names, seed).values() for name in own]
    count = clients * shards
    if count > len(line):
        raise UserError(
            f"{len(labels)} records in {len(line)} groups do not divide into {clients} x {shards} "
            f"shards; lower shards or the number of clients, or add rows"
        )
    size_G = np.array([size_of[name] for name in line], np.int64)
    # In integers, twice the middle against twice the cuts: no rounding moves a row.
    middle_G = 2 * np.cumsum(size_G) - size_G
    shard_G = middle_G * count // (2 * size_G.sum())
    if len(np.unique(shard_G)) < count:
        raise UserError(
            f"{len(labels)} records do not divide into {clients} x {shards} shards: the largest "
            f"group, of size {size_G.max()}, would leave a shard of {size_G.sum() / count:.1f} "
            f"empty; lower shards or the number of clients, or set granularity = 'rows'"
        )
    owner_S = generator("shards", seed).permutation(np.repeat(np.arange(clients), shards))
    owner = dict(zip(line, owner_S[shard_G].tolist(), strict=True))
    return indices([owner[name] for name in names], clients)
