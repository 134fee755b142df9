"""Division by key: all rows of a user, a source or a domain go to one client.

Letters: N rows, K clients.
"""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.partition.dealing import (
    check_clients,
    dealt,
    indices,
    largest_first,
    targets,
    unit_sizes,
)
from fedjax_llm.errors import UserError


def by_key(
    keys: Sequence[str],
    clients: int | None,
    seed: int,
    *,
    name: str = "key",
    groups: Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides rows by a natural key: each key goes wholly to one client.

    Keys are dealt the largest first, so that sizes end within the largest key of their targets
    (`dealing.turn`). The seed decides among keys of one size and among clients with equal targets.

    Args:
      keys: Key of each of N rows, such as its user; the empty text is a key like any other.
      clients: K, number of clients; several keys may share one. None gives every key a client of
        its own, in the order of `sorted(set(keys))`; shares then have no meaning.
      seed: Any integer.
      name: What a key is, for messages: "label", "user".
      groups: Group of each row, for which to check that it stays whole as well; None allows that
        rows of one group have several keys, and come to several clients.
      shares: K positive numbers, such as the clients' tokens per second; None is equal shares.
      sizes: Size of each row, at least 1, such as its tokens; None counts rows.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: No row, fewer keys than clients, a group of several keys, or a share too small for
        a key (`EmptyClient`).
    """
    check_clients(len(keys), 1 if clients is None else clients)
    if groups is not None:
        _check_groups(keys, groups, name)
    size_of = unit_sizes(keys, sizes)
    if clients is None:
        place = {key: client for client, key in enumerate(sorted(size_of))}
        return indices([place[key] for key in keys], len(place))
    if len(size_of) < clients:
        raise UserError(
            f"{len(size_of)} {name}s cannot be divided among {clients} clients, since a {name} "
            f"stays whole; lower the number of clients, or divide by 'dirichlet' or 'iid'"
        )
    target_K = targets(sum(size_of.values()), clients, shares)
    return dealt(keys, largest_first(size_of, seed), size_of, target_K, seed)


def by_label(labels: Sequence[str], clients: int, seed: int) -> list[np.ndarray]:
    """Divides rows by domain: each label goes wholly to one client; see `by_key`."""
    return by_key(labels, clients, seed, name="label")


def _check_groups(keys: Sequence[str], groups: Sequence[str], name: str) -> None:
    first: dict[str, str] = {}
    for key, group in zip(keys, groups, strict=True):
        if first.setdefault(group, key) != key:
            raise UserError(
                f"the group {group[:40]!r} has rows of the {name}s {first[group][:40]!r} and "
                f"{key[:40]!r}, so that groups and {name}s cannot both stay whole; "
                f"set granularity = 'rows', or group in the mapping"
            )
