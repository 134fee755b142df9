"""Even division: every client gets a random sample, of equal sizes or of sizes by given shares."""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.partition.dealing import (
    check_clients,
    dealt,
    largest_first,
    targets,
    unit_sizes,
)
from fedjax_llm.errors import UserError


def iid(
    groups: Sequence[str],
    clients: int,
    seed: int,
    *,
    shares: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides rows at random, each group whole, to sizes that are equal or as the shares say.

    Groups are dealt the largest first, those of one size in the order of a keyed hash, and every
    client ends within the largest group of its target, see `dealing.turn`; with single rows of size
    1, equal shares differ by at most one row. Which client a group goes to depends on the seed and
    on the groups and their sizes, not on the order of the rows.

    Args:
      groups: Group of each of N rows; `splitting.group_key` gives a record's. A list of distinct
        names makes every row its own group.
      clients: K, number of clients, at least 1.
      seed: Any integer.
      shares: K positive numbers, such as the clients' tokens per second; None is equal shares.
      sizes: Size of each row, at least 1, such as its tokens; None counts rows.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: No row, fewer groups than clients, a share that is not positive and finite, or one
        too small for a group (`EmptyClient`).
    """
    check_clients(len(groups), clients)
    size_of = unit_sizes(groups, sizes)
    if len(size_of) < clients:
        raise UserError(
            f"{len(groups)} records in {len(size_of)} groups cannot be divided among {clients} "
            f"clients, since a group stays whole; lower the number of clients or add rows"
        )
    target_K = targets(sum(size_of.values()), clients, shares)
    return dealt(groups, largest_first(size_of, seed), size_of, target_K, seed)
