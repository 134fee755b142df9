"""Which guesses an auditor stands by: from scores alone, never from the coins.

Letters: M canaries.
"""

import math

import numpy as np
from numpy.typing import NDArray

# Shares of the canaries that are guessed at; fixed before anything is seen. Few, because each
# takes its part of the probability of error. Besides these all canaries are guessed at once, which
# is best where a missing clip sets present and absent ones far apart.
GUESSED = (1 / 16, 1 / 8, 1 / 4)


def guesses_from(
    scores_M: NDArray[np.float64], neutral: float | None
) -> tuple[NDArray[np.int8], ...]:
    """Sets of guesses: 1 for present, -1 for absent, 0 for no guess; each [M].

    Args:
        scores_M: float64, without NaN.
        neutral: the score that speaks neither way; the median if None.

    Returns:
        For each share of `GUESSED` the guesses that are farthest from neutral, then one set about
        all canaries.
    """
    scores_M = np.clip(scores_M, -1e300, 1e300)  # so that no difference is NaN
    from_neutral_M = scores_M - (np.median(scores_M) if neutral is None else neutral)
    distance_M = np.abs(from_neutral_M)
    ordered_M = np.sort(distance_M)
    sets = []
    for share in GUESSED:
        farthest = ordered_M[-max(1, math.ceil(share * scores_M.size))]
        present_M = np.where(from_neutral_M > 0, 1, -1)
        sets.append(np.where(distance_M >= farthest, present_M, 0))
    return (*sets, np.where(scores_M > _valley(scores_M), 1, -1))


def _valley(scores_M: NDArray[np.float64]) -> float:
    """Where two clusters of scores part: the split that leaves the least variance within them."""
    ordered_M = np.sort(scores_M / max(float(np.abs(scores_M).max()), 1e-300))
    below = np.arange(1, ordered_M.size)
    if not below.size:
        return float(scores_M[0])
    sums = np.cumsum(ordered_M)[:-1]
    above, total = ordered_M.size - below, float(ordered_M.sum())
    between = sums**2 / below + (total - sums) ** 2 / above
    return float(np.sort(scores_M)[int(np.argmax(between))])
