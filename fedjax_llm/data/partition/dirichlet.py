"""Label skew: how the rows of a label fall to the clients is a draw from a Dirichlet distribution.

Letters: N rows, K clients, L labels, G groups of one label.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.partition.dealing import (
    check_clients,
    filled,
    generator,
    indices,
    shuffled,
    targets,
    turn,
    unit_sizes,
)
from fedjax_llm.errors import UserError

DRAWS = 1000
# Proportions are then equal to within 0.1 %; far above it NumPy's sum of gammas overflows.
MAX_CONCENTRATION = 1e6


def dirichlet(
    labels: Sequence[str],
    groups: Sequence[str] | None,
    clients: int,
    concentration: float,
    seed: int,
    minimum: int = 1,
) -> list[np.ndarray]:
    """Divides rows so that clients differ in their labels: small concentrations, large differences.

    For each label the proportions of its rows over the clients are a draw from the symmetric
    Dirichlet distribution over K clients (arXiv 1905.12022, section 4). The clients' numbers of
    rows differ too, unlike in `dirichlet_to_size`. All labels are drawn again, up to `DRAWS` times,
    until every client has its minimum; the distribution is therefore conditional on that.

    Each label's groups stand in the order of a keyed hash, the drawn proportions cut that line
    into K pieces, and a group goes to the piece that holds its middle. A group with several labels
    counts under its commonest one, the first in alphabetical order among equals. With groups,
    which client a group goes to does not depend on the order of the rows; without, only the number
    of rows of each label at each client does not.

    Args:
      labels: Label of each of N rows; the empty text is a label like any other.
      groups: Group of each row, which stays whole; None makes every row its own group.
      clients: K, number of clients, at least 1.
      concentration: In (0, 1e6]. 0.1 leaves most clients a few labels, 100 divides almost evenly.
      seed: Any integer.
      minimum: Rows that every client gets at least; 0 lets a client come out empty.

    Returns:
      K arrays of row indices.

    Raises:
      UserError: A value out of range, or no draw that gives every client its minimum.
      ValueError: `labels` and `groups` differ in length.
    """
    check_clients(len(labels), clients)
    check_concentration(concentration)
    if minimum < 0:
        raise UserError(f"minimum must be at least 0 rows, got {minimum}")
    names = [str(row) for row in range(len(labels))] if groups is None else groups
    sizes = Counter(names)
    if clients * minimum > len(labels) or (minimum and clients > len(sizes)):
        raise UserError(
            f"{len(labels)} records in {len(sizes)} groups cannot give {clients} clients at least "
            f"{minimum} each; lower the number of clients or minimum, or add rows"
        )
    line = [
        (members, np.array([sizes[name] for name in members], np.int64))
        for members in groups_by_label(labels, names, seed).values()
    ]
    draws = generator("dirichlet", seed)
    for _ in range(DRAWS):
        owner: dict[str, int] = {}
        rows_K = np.zeros(clients)
        for members, size_G in line:
            share_K = draws.dirichlet(np.full(clients, concentration))
            cuts = np.cumsum(share_K)[:-1] * size_G.sum()
            owner_G = np.searchsorted(cuts, np.cumsum(size_G) - size_G / 2)
            rows_K += np.bincount(owner_G, weights=size_G, minlength=clients)
            owner.update(zip(members, owner_G.tolist(), strict=True))
        if rows_K.min() >= minimum:
            return indices([owner[name] for name in names], clients)
    raise UserError(
        f"concentration = {concentration:g}: none of {DRAWS} draws gave each of "
        f"{clients} clients at least {minimum} records; raise concentration, or lower minimum or "
        f"the number of clients"
    )


def dirichlet_to_size(
    labels: Sequence[str],
    groups: Sequence[str] | None,
    clients: int,
    concentration: float,
    seed: int,
    *,
    shares: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides rows so that clients differ in their labels and have the sizes that they should.

    Each client draws its own proportions of the labels from a Dirichlet distribution whose mean is
    that of all rows, q ~ Dir(concentration * p), and fills its size from them; a label that has run
    out is left out of what follows (arXiv 1909.06335, section 3). Clients take groups in turn, in
    step with their targets (`dealing.turn`): filled one after another, the last would get what
    nobody wanted. Every client ends within the largest group of its target. A group of several
    labels counts as in `dirichlet`.

    Args:
      labels: Label of each of N rows; the empty text is a label like any other.
      groups: Group of each row, which stays whole; None makes every row its own group.
      clients: K, number of clients, at least 1.
      concentration: In (0, 1e6]; multiplies proportions of L labels that sum to 1, so that L times
        that of `dirichlet` is about as even.
      seed: Any integer.
      shares: K positive numbers, such as the clients' tokens per second; None is equal shares.
      sizes: Size of each row, at least 1, such as its tokens; None counts rows.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: A value out of range, fewer groups than clients, or a share too small for a group
        (`EmptyClient`).
    """
    check_clients(len(labels), clients)
    check_concentration(concentration)
    names = [str(row) for row in range(len(labels))] if groups is None else groups
    size_of = unit_sizes(names, sizes)
    if clients > len(size_of):
        raise UserError(
            f"{len(labels)} records in {len(size_of)} groups cannot give {clients} clients a group "
            f"each; lower the number of clients or add rows"
        )
    target_K = targets(sum(size_of.values()), clients, shares)
    waiting = [members[::-1] for members in groups_by_label(labels, names, seed).values()]
    weight_L = np.array([sum(size_of[name] for name in members) for members in waiting])
    draws = generator("dirichlet to size", seed)
    share_KxL = draws.dirichlet(concentration * weight_L / weight_L.sum(), clients)
    owner: dict[str, int] = {}
    load_K, largest = np.zeros(clients), max(size_of.values())
    ladders: list[list[float]] = []
    for uniform in draws.random(len(size_of)).tolist():
        if not ladders:
            left_L = np.array([len(members) for members in waiting])
            ladders = _ladders(share_KxL, left_L)
        client = turn(target_K, load_K, largest)
        label = bisect_right(ladders[client], uniform)
        name = waiting[label].pop()
        owner[name] = client
        load_K[client] += size_of[name]
        if not waiting[label]:
            ladders = []  # the label has run out: proportions change for everyone
    return filled(indices([owner[name] for name in names], clients), target_K, len(size_of))


def _ladders(share_KxL: np.ndarray, left_L: np.ndarray) -> list[list[float]]:
    """Cumulative proportions of each client over the labels that are left, for `bisect_right`."""
    open_KxL = np.where(left_L > 0, share_KxL, 0.0)
    # A client all of whose labels have run out takes from what is left, as it comes.
    none_K = open_KxL.sum(axis=1) <= 0
    open_KxL[none_K] = left_L
    ladder_KxL = np.cumsum(open_KxL, axis=1)
    last = int(np.flatnonzero(left_L)[-1])
    ladder_KxL /= ladder_KxL[:, last, None]
    # Rounding must lead neither to a label that has run out nor past the last.
    ladder_KxL[:, last:] = np.inf
    return list(ladder_KxL.tolist())


def check_concentration(concentration: float) -> None:
    """Raises UserError when it is out of range."""
    if not 0 < concentration <= MAX_CONCENTRATION:
        raise UserError(
            f"concentration must be above 0 and at most {MAX_CONCENTRATION:g}, "
            f"got {concentration:g}"
        )


def groups_by_label(
    labels: Sequence[str], groups: Sequence[str], seed: int
) -> dict[str, list[str]]:
    """The groups of each label in the order of a keyed hash; labels in alphabetical order."""
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        votes[group][label] += 1
    members: defaultdict[str, list[str]] = defaultdict(list)
    for group in sorted(votes, key=lambda group: shuffled(group, seed)):
        label, _ = min(votes[group].items(), key=lambda item: (-item[1], item[0]))
        members[label].append(group)
    return {label: members[label] for label in sorted(members)}
