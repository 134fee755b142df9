"""Quantity skew: clients alike in their labels and unlike in how much they hold.

Letters: K clients.
"""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.partition.dealing import EmptyClient, check_clients, generator, unit_sizes
from fedjax_llm.data.partition.dirichlet import DRAWS, check_concentration
from fedjax_llm.data.partition.even import iid
from fedjax_llm.errors import UserError

# At 30 the second client has a billionth of the first.
MAX_EXPONENT = 30.0


def by_quantity(
    groups: Sequence[str],
    clients: int,
    seed: int,
    *,
    concentration: float | None = None,
    exponent: float | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides rows at random, each group whole, to sizes that follow a law.

    With `concentration` the sizes are a draw from the symmetric Dirichlet distribution (arXiv
    2102.02079, "quantity skew"), drawn again up to `DRAWS` times until every client has a group.
    With `exponent` the client of rank r has a size in proportion to r ** -exponent, a power law as
    among the devices of arXiv 1812.06127, section 5.1; the seed decides the ranks.

    Args:
      groups: Group of each of N rows, as in `even.iid`.
      clients: K, number of clients, at least 1.
      seed: Any integer.
      concentration: In (0, 1e6]; small concentrations make sizes unlike.
      exponent: In [0, 30]; 0 is equal sizes. Exactly one of the two is given.
      sizes: Size of each row, at least 1; None counts rows.

    Returns:
      K arrays of row indices, none of them empty; each within the largest group of its size.

    Raises:
      UserError: A value out of range, none or both given, too few groups, or sizes that leave a
        client empty (`EmptyClient` for the power law).
    """
    if (concentration is None) == (exponent is None):
        given = "neither" if exponent is None else "both"
        raise UserError(f"sizes follow from either concentration or exponent, {given} given")
    if exponent is not None:
        shares_K = power_law_shares(clients, exponent, seed)
        try:
            return iid(groups, clients, seed, shares=shares_K.tolist(), sizes=sizes)
        except EmptyClient as error:
            raise EmptyClient(
                error.client,
                clients,
                f"at exponent = {exponent:g} its share of {shares_K[error.client]:.2g} is too "
                f"small for a group; lower exponent or the number of clients, or add rows",
            ) from None
    assert concentration is not None
    check_concentration(concentration)
    check_clients(len(groups), clients)
    size_of = unit_sizes(groups, sizes)
    # A share far below one group cannot fill; the deal itself, which is slow, decides near it.
    least = 0.5 * min(size_of.values()) / sum(size_of.values())
    draws = generator("quantity", seed)
    for _ in range(DRAWS):
        shares_K = draws.dirichlet(np.full(clients, concentration))
        if shares_K.min() < least:
            continue
        try:
            return iid(groups, clients, seed, shares=shares_K.tolist(), sizes=sizes)
        except EmptyClient:
            continue
    raise UserError(
        f"concentration = {concentration:g}: none of {DRAWS} draws gave each of {clients} clients "
        f"one of {len(size_of)} groups; raise concentration, or lower the number of clients"
    )


def power_law_shares(clients: int, exponent: float, seed: int) -> np.ndarray:
    """Shares in proportion to rank ** -exponent, float64 [K], whose order the seed decides.

    Raises:
      UserError: Exponent out of range.
    """
    if not 0 <= exponent <= MAX_EXPONENT:
        raise UserError(f"exponent must be in [0, {MAX_EXPONENT:g}], got {exponent:g}")
    weight_K = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    return generator("ranks", seed).permutation(weight_K / weight_K.sum())
