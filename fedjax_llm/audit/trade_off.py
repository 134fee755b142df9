"""The f-DP test against the trade-off of a plan's own mechanism, Poisson sampling included.

jax-privacy tests against Gaussian trade-offs. A sampled mechanism is much more private against an
observer who looks at many canaries than a Gaussian of the same epsilon at a small delta, so that
neither that test nor one of (epsilon, delta) alone comes near its epsilon. The test of arXiv
2410.22235 (section 3) holds for any trade-off; here it is given the accountant's.

| symbol | name | meaning |
|---|---|---|
| m | `canaries` | coins tossed |
| k, c | `guesses`, `correct` | guesses made, and how many were right |
| p | `significance` | probability of rejecting what is true |
| delta(e) | | privacy profile: smallest delta at which epsilon e holds, either way round |
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.privacy import PrivacyPlan

# Where profiles are read off; between two of these the bound is a little less tight, and no less
# valid. Beyond 20, no more than e^-20 of the probability matters.
_EPSILONS = np.concatenate([np.linspace(0.0, 4.0, 161), np.linspace(4.1, 20.0, 100)])
_MOST_NOISE = 100.0
_LEAST_NOISE = 0.1
_STEPS = 14

Inverse = Callable[[float], float]


def refuted(
    guesses: int, correct: int, canaries: int, significance: float, inverse: Inverse
) -> bool:
    """Whether so many right guesses refute that a mechanism is f-DP.

    Formal guarantee: for an f-DP mechanism into which `canaries` fair coins were put, and a fixed
    number of guesses, true with probability at most `significance`.

    The bound walks down from c right guesses: `at` bounds the probability, per canary, of a right
    guess among outcomes with at least i right ones, and `beyond` of a wrong one. f-DP ties the two
    at each i; if they end above k / m, no f-DP mechanism is right so often.

    Args:
        guesses: k, at least 1.
        correct: c, in [0, k].
        canaries: m.
        significance: p.
        inverse: x -> the least Q(E) of any event with P(E) = x, where P and Q are what the
            mechanism puts out with and without a unit, either way round.
    """
    at = significance * correct / canaries
    beyond = significance * (guesses - correct) / canaries
    for i in reversed(range(correct)):
        further = inverse(at)
        if further <= beyond:
            break
        at = min(at + i / (guesses - i) * (further - beyond), 1.0)
        beyond = further
    return at + beyond > guesses / canaries


def profile_inverse(epsilons: NDArray[np.float64], deltas: NDArray[np.float64]) -> Inverse:
    """The `inverse` of `refuted` from points of a privacy profile.

    With P(E) <= e^e Q(E) + delta(e), and the same for the complement with P and Q exchanged,
    Q(E) >= e^-e (P(E) - delta(e)) and Q(E) >= 1 - delta(e) - e^e (1 - P(E)).

    Args:
        epsilons: e, from 0 upwards.
        deltas: delta(e), or an upper bound.
    """
    factors = np.exp(epsilons)

    def inverse(x: float) -> float:
        below = (x - deltas) / factors
        above = 1 - deltas - factors * (1 - x)
        return max(0.0, float(below.max()), float(above.max()))

    return inverse


def plan_inverse(plan: PrivacyPlan, noise_multiplier: float) -> Inverse:
    """`profile_inverse` of what the plan composes, at another noise.

    By privacy loss distributions, whose deltas are upper bounds; so what is refuted is refuted.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    noise = noise_multiplier
    steps = plan.rounds * plan.sampler.steps_per_round
    interval = 1e-3 if noise >= 0.5 else 1e-4 * (0.5 / noise**2 + 10 / noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in far tails, which the bound accounts for
        one: Any = pld.from_gaussian_mechanism(
            noise, sampling_prob=max(plan.sampler.rates), value_discretization_interval=interval
        )
        composed = one if steps == 1 else one.self_compose(steps)
        deltas = np.asarray(composed.get_delta_for_epsilon(_EPSILONS), np.float64)
    return profile_inverse(_EPSILONS, deltas)


def least_private_refuted(
    plan: PrivacyPlan,
    outcomes: Sequence[tuple[int, int]],
    canaries: int,
    significance: float,
) -> tuple[float, int] | None:
    """The smallest noise at which the plan's mechanism is refuted, and by which guesses.

    Args:
        plan: gives sampling and steps; Gaussian noise, independent, for adding or removing a unit.
        outcomes: (guesses, correct) of each set of guesses.
        canaries: m.
        significance: of each set.

    Returns:
        The noise multiplier, to 2 %, and the place of the set in `outcomes`; None if even a
        hundred clip norms of noise are not refuted. Mechanisms with less noise than a tenth of a
        clip norm are not tried.
    """

    def by(noise: float) -> int | None:
        inverse = plan_inverse(plan, noise)
        for place, (guesses, correct) in enumerate(outcomes):
            if 2 * correct > guesses and refuted(guesses, correct, canaries, significance, inverse):
                return place
        return None

    found = by(_MOST_NOISE)
    if found is None:
        return None
    low, high = _LEAST_NOISE, _MOST_NOISE
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        place = by(middle)
        if place is None:
            low = middle
        else:
            high, found = middle, place
        if high < 1.01 * low:
            break
    return high, found
