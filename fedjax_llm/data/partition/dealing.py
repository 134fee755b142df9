"""Dealing: units that stay whole go to clients until each is as near its target as greed can.

A unit is what one client gets or does not get: a group of rows, a single row, or all rows of a key.
Its size is its rows, or any other positive measure, such as tokens.

Nothing is drawn from a global generator: orders come from `splitting.keyed_hash` and draws from
NumPy's PCG64, whose seed is such a hash. The stream of PCG64 is fixed for all machines and
versions; how `Generator` turns it into Dirichlet variates may change with a version of NumPy
(NEP 19), never with the machine.

Letters: N rows, U units, K clients.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError


class EmptyClient(UserError):
    """A client would come out without a row.

    Attributes:
      client: Which, from 0.
      reason: Why, and the cure; the message is this with the client in front.
    """

    def __init__(self, client: int, clients: int, reason: str) -> None:
        super().__init__(f"client {client + 1} of {clients} would come out empty: {reason}")
        self.client, self.reason = client, reason


def check_clients(rows: int, clients: int) -> None:
    """Raises UserError when there is no client or no row."""
    if clients < 1:
        raise UserError(f"the number of clients must be at least 1, got {clients}")
    if not rows:
        raise UserError("no record to divide among clients; check the sources and the mapping")


def targets(total: float, clients: int, shares: Sequence[float] | None) -> np.ndarray:
    """What each client should get of `total`.

    Args:
      total: Of all rows, in the measure of their sizes.
      clients: K.
      shares: K positive numbers in any unit, such as tokens per second; None is equal shares.

    Returns:
      float64 [K], which sums to `total`.

    Raises:
      UserError: Another number of shares, or one that is not positive and finite.
    """
    if shares is None:
        shares = [1.0] * clients
    if len(shares) != clients:
        raise UserError(
            f"{len(shares)} shares for {clients} clients; give one positive number for each"
        )
    for client, share in enumerate(shares):
        if not 0 < share < math.inf:
            raise UserError(
                f"the share of client {client + 1} must be positive and finite, got {share:g}; "
                f"leave a client out that is to get nothing"
            )
    # Divided by the largest first: the sum of shares near the largest float would overflow.
    share_K = np.array(shares, np.float64) / max(shares)
    return total * share_K / share_K.sum()


def unit_sizes(units: Sequence[str], sizes: Sequence[int] | None) -> dict[str, int]:
    """The size of each unit, in the order in which units first occur.

    Args:
      units: The unit of each of N rows.
      sizes: The size of each row, at least 1; None counts rows.

    Raises:
      ValueError: Another number of sizes than rows, or a size below 1.
    """
    found: dict[str, int] = {}
    for unit, size in zip(units, [1] * len(units) if sizes is None else sizes, strict=True):
        if size < 1:
            raise ValueError(f"the size of a row must be at least 1, got {size}")
        found[unit] = found.get(unit, 0) + int(size)
    return found


def deal(sizes: Sequence[int], target_K: np.ndarray, seed: int) -> list[int]:
    """Gives each unit, in the given order, to the client whose turn it is (`turn`).

    Args:
      sizes: Of U units.
      target_K: What each client should get; sums to the sum of the sizes.
      seed: Decides among clients whose turn it is alike.

    Returns:
      The client of each unit.
    """
    # Without the permutation the first client would always get the largest unit.
    client_K = generator("clients", seed).permutation(len(target_K))
    turn_K, load_K = target_K[client_K], np.zeros(len(target_K))
    owner = []
    for size in sizes:
        place = turn(turn_K, load_K, size)
        load_K[place] += size
        owner.append(int(client_K[place]))
    return owner


def turn(target_K: np.ndarray, load_K: np.ndarray, size: int) -> int:
    """The client that should take the next unit.

    Of the clients for which the unit fits below the target, it is the one that is furthest behind
    its share of what is dealt so far: clients fill in step with their targets, so that a large one
    does not have first choice. Where the unit fits for none, it is the one furthest below its
    target.

    If the targets sum to the total, every client ends within (K - 1) / K of the largest unit of its
    target. Proof: call target less load the deficit; deficits sum to what is left, 0 at the end. A
    unit that fits leaves a deficit of 0 or more. One that fits for none goes to the largest
    deficit, at least 1 / K of the unit, so no client ends more than (K - 1) / K of a unit above its
    target. Let d > 0 be the largest deficit at the end. A client that ends below 0 took its last
    unit as the largest deficit, so at d or above, and ends at d less a unit or above. If d were
    more than a unit, none would end below 0, and the sum were not 0; so all end at d less a unit or
    above, and d is at most (K - 1) / K of a unit.

    Args:
      target_K: What each client should get.
      load_K: What each has.
      size: Of the unit, or the largest that it can have where that is known only later.

    Returns:
      The client, from 0; the first among equals.
    """
    deficit_K = target_K - load_K
    fits_K = deficit_K >= size
    if not fits_K.any():
        return int(np.argmax(deficit_K))
    dealt = (load_K.sum() + size) / target_K.sum()
    return int(np.argmax(np.where(fits_K, target_K * dealt - load_K, -np.inf)))


def largest_first(sizes: dict[str, int], seed: int) -> list[str]:
    """The units by decreasing size, those of one size in a random order."""
    return sorted(sizes, key=lambda unit: (-sizes[unit], *shuffled(unit, seed)))


def dealt(
    units: Sequence[str],
    order: Sequence[str],
    sizes: dict[str, int],
    target_K: np.ndarray,
    seed: int,
) -> list[np.ndarray]:
    """Deals units in an order; returns the rows of each client.

    Raises:
      EmptyClient: A client's target is too small for it to get a unit.
    """
    owners = deal([sizes[unit] for unit in order], target_K, seed)
    owner = dict(zip(order, owners, strict=True))
    return filled(indices([owner[unit] for unit in units], len(target_K)), target_K, len(sizes))


def filled(parts: list[np.ndarray], target_K: np.ndarray, units: int) -> list[np.ndarray]:
    """The parts, none of which may be empty.

    Raises:
      EmptyClient: One is.
    """
    for client, part in enumerate(parts):
        if not len(part):
            share = target_K[client] / target_K.sum()
            raise EmptyClient(
                client,
                len(parts),
                f"its share of {share:.2%} is too small for one of the {units} units that stay "
                f"whole; raise its share, lower the number of clients, or add rows",
            )
    return parts


def indices(owner: Sequence[int], clients: int) -> list[np.ndarray]:
    """The rows of each client, int64, ascending; `owner` is the client of each row."""
    owner_N = np.array(owner, np.int64)
    order_N = np.argsort(owner_N, kind="stable").astype(np.int64)
    return np.split(order_N, np.cumsum(np.bincount(owner_N, minlength=clients))[:-1])


def shuffled(unit: str, seed: int) -> tuple[bytes, str]:
    """Sort key of a random order that a collision of hashes cannot make depend on the rows."""
    # Prefixed, so that the order is not the one by which `split_by_group` chose its sides.
    return keyed_hash(f"partition\0{unit}", seed), unit


def generator(purpose: str, seed: int) -> np.random.Generator:
    """A generator of its own for each purpose and seed."""
    entropy = int.from_bytes(keyed_hash(f"partition\0{purpose}", seed), "big")
    return np.random.Generator(np.random.PCG64(entropy))
