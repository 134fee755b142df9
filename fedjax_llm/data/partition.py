"""Partition: how a set of records is divided among clients, for simulated federations.

Every function returns one int64 array per client: the indices of its records in ascending order;
every index occurs exactly once. Nothing is drawn from a global generator: orders come from
`splitting.keyed_hash` and draws from NumPy's PCG64, whose seed is such a hash. The stream of PCG64
is fixed for all machines and versions; how `Generator` turns it into Dirichlet variates may change
with a version of NumPy (NEP 19), never with the machine.

Letters: N records, K clients, G groups of one label.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import group_key, keyed_hash
from fedjax_llm.errors import UserError
from fedjax_llm.models.batch import Batch

How = Literal["iid", "dirichlet", "label"]

DIRICHLET_DRAWS = 1000
# Proportions are then equal to within 0.1 %; far above it NumPy's sum of gammas overflows.
MAX_CONCENTRATION = 1e6


def partition(
    records: Sequence[Record], clients: int, how: How, concentration: float, seed: int
) -> list[np.ndarray]:
    """Divides records among clients as `how` says.

    "iid" and "dirichlet" keep every group (`splitting.group_key`) with one client. "label" keeps
    every label with one client, so that a group with several labels may end up with several. An
    empty label beside others counts as a label.

    Args:
      records: N records, such as `Corpus.train_records`.
      clients: K, number of clients, at least 1.
      how: "iid", "dirichlet" or "label"; see `iid`, `dirichlet` and `by_label`.
      concentration: Of "dirichlet"; the others ignore it.
      seed: Any integer.

    Returns:
      K arrays of indices into `records`, none of them empty.

    Raises:
      UserError: Unknown `how`, labels that are missing, or too few records, groups or labels.
    """
    if how not in get_args(How):
        raise UserError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
    groups = [group_key(record) for record in records]
    if how == "iid":
        return iid(groups, clients, seed)
    labels = [record.label for record in records]
    if labels and not any(labels):
        raise UserError(
            f"cannot divide by {how!r}: none of the {len(labels)} records has a label; set label "
            f"in the mapping, or divide by 'iid'"
        )
    if how == "dirichlet":
        return dirichlet(labels, groups, clients, concentration, seed)
    return by_label(labels, clients, seed)


def iid(groups: Sequence[str], clients: int, seed: int) -> list[np.ndarray]:
    """Divides rows at random and evenly, each group whole.

    Groups go to the client with the fewest rows so far, the largest group first and groups of one
    size in the order of a keyed hash. So sizes differ by at most the largest group, and by at most
    one row where every row is its own group. Which client a group goes to depends on the seed and
    on the groups and their sizes, not on the order of the rows.

    Args:
      groups: Group of each of N rows; `splitting.group_key` gives a record's.
      clients: K, number of clients, at least 1.
      seed: Any integer.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: No row, or fewer groups than clients.
    """
    _check(len(groups), clients)
    if (count := len(set(groups))) < clients:
        raise UserError(
            f"{len(groups)} records in {count} groups cannot be divided among {clients} clients, "
            f"since a group stays whole; lower the number of clients or add rows"
        )
    return _whole(groups, clients, seed)


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
    rows differ too, unlike in arXiv 1909.06335, section 3, which draws proportions over the labels
    for clients of one size. All labels are drawn again, up to `DIRICHLET_DRAWS` times, until every
    client has its minimum; the distribution is therefore conditional on that.

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
    _check(len(labels), clients)
    if not 0 < concentration <= MAX_CONCENTRATION:
        raise UserError(
            f"concentration must be above 0 and at most {MAX_CONCENTRATION:g}, "
            f"got {concentration:g}"
        )
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
        for members in _groups_by_label(labels, names, seed)
    ]
    generator = _generator("dirichlet", seed)
    for _ in range(DIRICHLET_DRAWS):
        owner: dict[str, int] = {}
        rows_K = np.zeros(clients)
        for members, size_G in line:
            share_K = generator.dirichlet(np.full(clients, concentration))
            cuts = np.cumsum(share_K)[:-1] * size_G.sum()
            owner_G = np.searchsorted(cuts, np.cumsum(size_G) - size_G / 2)
            rows_K += np.bincount(owner_G, weights=size_G, minlength=clients)
            owner.update(zip(members, owner_G.tolist(), strict=True))
        if rows_K.min() >= minimum:
            return _indices([owner[name] for name in names], clients)
    raise UserError(
        f"concentration = {concentration:g}: none of {DIRICHLET_DRAWS} draws gave each of "
        f"{clients} clients at least {minimum} records; raise concentration, or lower minimum or "
        f"the number of clients"
    )


def by_label(labels: Sequence[str], clients: int, seed: int) -> list[np.ndarray]:
    """Divides rows by domain: each label goes wholly to one client.

    Labels are assigned as `iid` assigns groups: the largest first, to the client with the fewest
    rows so far. The seed decides which client gets which share, and among labels of one size.

    Args:
      labels: Label of each of N rows; the empty text is a label like any other.
      clients: K, number of clients, at least 1.
      seed: Any integer.

    Returns:
      K arrays of row indices, none of them empty.

    Raises:
      UserError: No row, or fewer labels than clients.
    """
    _check(len(labels), clients)
    if (count := len(set(labels))) < clients:
        raise UserError(
            f"{count} labels cannot be divided among {clients} clients, since a label stays "
            f"whole; lower the number of clients, or divide by 'dirichlet' or 'iid'"
        )
    return _whole(labels, clients, seed)


def select(batch: Batch, indices_N: np.ndarray) -> Batch:
    """The rows `indices_N` of a batch [B, T], in that order, as NumPy arrays.

    Row i of a corpus's batch is its record i only without packing, and only if rendering lost none
    (`RenderReport.lost`); otherwise divide the records first and render each client's own.
    """
    # JAX would clamp an index that is out of range; NumPy raises IndexError.
    return Batch(*(np.asarray(array)[indices_N] for array in batch))


def _check(rows: int, clients: int) -> None:
    if clients < 1:
        raise UserError(f"the number of clients must be at least 1, got {clients}")
    if not rows:
        raise UserError("no record to divide among clients; check the sources and the mapping")


def _whole(keys: Sequence[str], clients: int, seed: int) -> list[np.ndarray]:
    """Rows of one key to one client: the largest key first, to the client with fewest rows."""
    sizes = Counter(keys)
    # Without the permutation the first client would always get the largest key.
    client_K = _generator("clients", seed).permutation(clients)
    loads = [(0, turn) for turn in range(clients)]
    owner = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], *_shuffled(key, seed))):
        rows, turn = loads[0]
        owner[key] = int(client_K[turn])
        heapq.heapreplace(loads, (rows + sizes[key], turn))
    return _indices([owner[key] for key in keys], clients)


def _groups_by_label(labels: Sequence[str], groups: Sequence[str], seed: int) -> list[list[str]]:
    """The groups of each label in the order of a keyed hash; labels in alphabetical order."""
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        votes[group][label] += 1
    members: defaultdict[str, list[str]] = defaultdict(list)
    for group in sorted(votes, key=lambda group: _shuffled(group, seed)):
        label, _ = min(votes[group].items(), key=lambda item: (-item[1], item[0]))
        members[label].append(group)
    return [members[label] for label in sorted(members)]


def _indices(owner: Sequence[int], clients: int) -> list[np.ndarray]:
    owner_N = np.array(owner, np.int64)
    order_N = np.argsort(owner_N, kind="stable").astype(np.int64)
    return np.split(order_N, np.cumsum(np.bincount(owner_N, minlength=clients))[:-1])


def _shuffled(key: str, seed: int) -> tuple[bytes, str]:
    """Sort key of a random order that a collision of hashes cannot make depend on the rows."""
    # Prefixed, so that the order is not the one by which `split_by_group` chose its sides.
    return keyed_hash(f"partition\0{key}", seed), key


def _generator(purpose: str, seed: int) -> np.random.Generator:
    entropy = int.from_bytes(keyed_hash(f"partition\0{purpose}", seed), "big")
    return np.random.Generator(np.random.PCG64(entropy))
