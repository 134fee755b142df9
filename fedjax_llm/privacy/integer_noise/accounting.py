"""Epsilon of distributed integer noise, by Rényi divergences.

Letter: O orders of the divergence.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# From 1.02 to 2^20, close enough to cost less than 0.1 percent of epsilon, and integers, at which
# the bound for Skellam noise is known.
ORDERS_O: Floats = np.union1d(1 + 2.0 ** (np.arange(-90, 321) / 16), np.arange(2.0, 129))

_SMALLEST_SHARE = 0.5


def l1_sensitivity(l2_sensitivity: float, dimension: int) -> float:
    """min(sqrt(d) Delta_2, Delta_2^2): the second because |x| <= x^2 for integers."""
    return min(math.sqrt(dimension) * l2_sensitivity, l2_sensitivity * l2_sensitivity)


def discrete_gaussian_divergence(
    orders_O: Floats, stddev: float, shares: int, l2_sensitivity: float, dimension: int
) -> Floats:
    """Rényi divergence between an integer vector plus noise and a neighbour plus noise.

    The noise is the sum of n discrete Gaussian vectors of parameter s^2 = stddev^2 / n.
    arXiv:2102.06387, theorem 1 and proposition 14: if s >= 1/2, then for every order alpha >= 1

        D_alpha <= min(alpha Delta_2^2 / (2 n s^2) + tau d,
                       alpha / 2 (Delta_2^2 / (n s^2) + 2 Delta_1 tau / (sqrt(n) s) + tau^2 d)),
        tau = 10 sum over k from 1 to n - 1 of exp(-2 pi^2 s^2 k / (k + 1)).

    Its third form, alpha / 2 (Delta_2 / (sqrt(n) s) + tau sqrt(d))^2, is never smaller than the
    second, because Delta_1 <= sqrt(d) Delta_2. A sum of discrete Gaussians is not one, and tau
    bounds how far it is off; with one share tau is 0.

    Returns:
        [O] float64; inf where s < 1/2.
    """
    variance = stddev * stddev / shares
    if variance < _SMALLEST_SHARE**2:
        return np.full_like(orders_O, math.inf)
    k = np.arange(1, shares, dtype=np.float64)
    tau = 10 * float(np.exp(-2 * math.pi**2 * variance * (k / (k + 1))).sum())
    ratio = l2_sensitivity / stddev
    mixed = 2 * l1_sensitivity(l2_sensitivity, dimension) / stddev * tau
    return np.minimum(
        orders_O * (ratio * ratio / 2) + tau * dimension,
        orders_O / 2 * (ratio * ratio + mixed + tau * tau * dimension),
    )


def skellam_divergence(
    orders_O: Floats, stddev: float, l2_sensitivity: float, dimension: int
) -> Floats:
    """As `discrete_gaussian_divergence`, for Skellam noise of variance mu = stddev^2.

    A sum of Skellam variables is one, so the number of shares does not matter. arXiv:2110.04995,
    section 3, for integer orders alpha >= 2 and integer vectors:

        D_alpha <= alpha Delta_2^2 / (2 mu)
                   + min(((2 alpha - 1) Delta_2^2 + 6 Delta_1) / (4 mu^2), 3 Delta_1 / (2 mu)).

    Between integers, (alpha - 1) D_alpha is convex in alpha (van Erven and Harremoes,
    arXiv:1206.2459, corollary 2), so the chord bounds it; below 2, D_alpha <= D_2.

    Returns:
        [O] float64.
    """
    variance, ratio = stddev * stddev, l2_sensitivity / stddev
    # Delta_1 / mu, without squares that might leave float64.
    absolute = l1_sensitivity(l2_sensitivity, dimension) / stddev / stddev

    def log_moment(order_O: Floats) -> Floats:
        second_O = ((2 * order_O - 1) * (ratio * ratio) + 6 * absolute) / (4 * variance)
        extra_O = np.minimum(second_O, 1.5 * absolute)
        return (order_O - 1) * (order_O * (ratio * ratio / 2) + extra_O)

    above_O = np.maximum(orders_O, 2)
    below_O = np.floor(above_O)
    part_O = above_O - below_O
    chord_O = (1 - part_O) * log_moment(below_O) + part_O * log_moment(below_O + 1)
    return chord_O / (above_O - 1)


def certified_epsilon(
    orders_O: Floats, divergence_O: Floats, delta: float, total_variation: float
) -> float:
    """Epsilon at delta of a mechanism that is `total_variation` away from an ideal one.

    Formal guarantee: let the ideal mechanism be (epsilon, delta')-private and every output of the
    real one within eta of the ideal one's in total variation. For every event S and neighbours
    D, D', real P(D in S) <= ideal P(D in S) + eta <= e^epsilon ideal P(D' in S) + delta' + eta
    <= e^epsilon real P(D' in S) + delta' + (1 + e^epsilon) eta. So the real one is
    (epsilon, delta)-private if delta' <= delta - (1 + e^epsilon) eta. The ideal epsilon at delta'
    comes from the Rényi divergences by proposition 12 of arXiv:2004.00010 (`dp_accounting`).

    Args:
        orders_O: orders above 1.
        divergence_O: of all rounds together.
        delta: in (0, 1).
        total_variation: eta, of all draws together.

    Returns:
        Epsilon up to float64 rounding; inf where eta would use up more than half of delta.
    """
    from dp_accounting.rdp import compute_epsilon

    def ideal(delta: float) -> float:
        return float(compute_epsilon(orders_O, divergence_O, delta)[0])

    # At half of delta epsilon is larger than at the delta' that is left in the end, so what it
    # makes eta cost is enough for that one too.
    coarse = ideal(delta / 2)
    if coarse > 700:  # e^epsilon leaves float64
        return math.inf
    cost = (1 + math.exp(coarse)) * total_variation
    return ideal(delta - cost) if cost <= delta / 2 else math.inf
