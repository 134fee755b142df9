"""Epsilon of composed Gaussian mechanisms, by privacy loss distributions (PLD)."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

# A noise multiplier below this gives epsilons in the hundreds per step and distributions that do
# not fit in memory; no such number is worth printing.
MIN_NOISE_MULTIPLIER = 0.05


def _interval(noise_multiplier: float) -> float:
    """Width of a bucket of the discretised privacy loss; the result is an upper bound at any."""
    if noise_multiplier >= 0.5:
        return 1e-4
    # Loss spans about 1 / (2 z^2) + 10 / z a step; keep that to 10^5 buckets.
    return 1e-5 * (0.5 / noise_multiplier**2 + 10 / noise_multiplier)


@functools.lru_cache(maxsize=64)
def _step_pld(rate: float, noise_multiplier: float, interval: float, replace: bool) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in far tails, which the bound accounts for
        return pld.from_gaussian_mechanism(
            noise_multiplier,
            sampling_prob=rate,
            value_discretization_interval=interval,
            neighboring_relation=(
                NeighboringRelation.REPLACE_ONE
                if replace
                else NeighboringRelation.ADD_OR_REMOVE_ONE
            ),
        )


@functools.lru_cache(maxsize=4096)
def epsilon(
    rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    interval: float | None = None,
    *,
    replace: bool = False,
) -> float:
    """Epsilon of `steps` Poisson-sampled Gaussian mechanisms, for one unit more or less.

    Formal guarantee: an upper bound on the true epsilon at `delta` for rates below one
    (pessimistic PLD with connected dots, arXiv:2207.04380, up to the float64 rounding of its
    convolutions); at rate one the exact value (arXiv:1805.06530, theorem 8), because the
    composition of Gaussians is a Gaussian.

    | input                                  | epsilon |
    |----------------------------------------|---------|
    | steps 0 or rate 0                      | 0       |
    | noise multiplier below 0.05            | inf     |
    | delta below what the PLD's tails allow | inf     |

    Args:
        rate: probability with which a unit takes part in a step, in [0, 1].
        noise_multiplier: standard deviation of the noise over the sensitivity.
        steps: how many mechanisms are composed.
        delta: in (0, 1).
        interval: bucket width of the discretised loss; smaller is tighter and slower.
        replace: for one unit replaced by another, where the noise multiplier is still that of one
            unit more or less.
    """
    if steps == 0 or rate == 0:
        return 0.0
    if not noise_multiplier >= MIN_NOISE_MULTIPLIER:
        return math.inf
    if rate >= 1:
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

        apart = 2 if replace else 1
        return float(get_epsilon_gaussian(noise_multiplier / (apart * math.sqrt(steps)), delta))
    one = _step_pld(rate, noise_multiplier, interval or _interval(noise_multiplier), replace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composed = one if steps == 1 else one.self_compose(steps)
        return float(composed.get_epsilon_for_delta(delta))


def least_noise(epsilon_of: Callable[[float, float | None], float], target: float) -> float | None:
    """Smallest noise multiplier, to a relative 10^-3, whose epsilon is at most `target`.

    The search runs on a coarser discretisation, whose epsilons are upper bounds too; the result
    is checked at full resolution.

    Args:
        epsilon_of: epsilon of a noise multiplier at a bucket width, as `epsilon` takes it.
        target: above zero.

    Returns:
        The noise multiplier, or None when 10^4 is not enough.
    """

    def coarse(noise: float) -> float:
        return epsilon_of(noise, max(1e-3, _interval(noise)))

    low, high = MIN_NOISE_MULTIPLIER, 1.0
    while coarse(high) > target:
        low, high = high, 2 * high
        if high > 1e4:
            return None
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        if coarse(middle) > target:
            low = middle
        else:
            high = middle
    while epsilon_of(high, None) > target:
        high *= 1.001
    return high
