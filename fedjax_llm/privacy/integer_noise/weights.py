"""Probabilities of integer noise, as integers of high precision.

Each function returns weights w_0 ... w_X of the values 0 ... X of a symmetric distribution p on
the integers; -x weighs as much as x. Formal guarantee, for variances in [2^-20, 2^24]: the total
variation between p and the normalised weights is below `ERROR`.
"""

import bisect
import math
from decimal import Context, Decimal
from fractions import Fraction

ERROR = 2.0**-170

_FRACTION_BITS = 320
_DIGITS = 120  # 398 bits
_TAIL_BITS = 190


def discrete_gaussian(variance: Fraction) -> list[int]:
    """Weights proportional to exp(-x^2 / (2 variance)), arXiv:2004.00010, definition 1.

    w_{x+1} = w_x q_x and q_{x+1} = q_x r^2 with r = q_0 = exp(-1 / (2 variance)), in fixed point
    with 320 fractional bits. All factors are at most 1, so errors only add: after x < 2^17 steps
    they are below 2^-320 (2 x^2 + 4 x) < 2^-284. Values stop below 2^-180, at 15.8 standard
    deviations; the distribution is subgaussian (arXiv:2004.00010, section 2.3), so less than
    2^-178 lies beyond.
    """
    context = Context(prec=_DIGITS)
    exponent = context.divide(Decimal(-variance.denominator), Decimal(2 * variance.numerator))
    one = 1 << _FRACTION_BITS
    ratio = int(context.multiply(context.exp(exponent), Decimal(one)))
    square = ratio * ratio >> _FRACTION_BITS
    weights = [one]
    while weights[-1] >> (_FRACTION_BITS - 180):
        weights.append(weights[-1] * ratio >> _FRACTION_BITS)
        ratio = ratio * square >> _FRACTION_BITS
    return weights


def skellam(variance: Fraction) -> list[int]:
    """Weights proportional to I_x(variance), the modified Bessel function of the first kind.

    That is the difference of two Poisson variables of mean variance / 2. Miller's backward
    recurrence I_{x-1} = I_{x+1} + (2 x / v) I_x from y_{X+1} = 0 gives I_x up to a factor and an
    error of at most I_{X+1}, because the second solution K_x grows with x; X is chosen so that
    P(X + 1) < 2^-190 by Chernoff's bound. All terms are positive and none is below 2^232, because
    2 X / v >= 2^-8: X < 2^17 roundings cost a relative 2^-215 at most.
    """
    v = float(variance)

    def chernoff(x: int) -> float:
        return x * math.asinh(x / v) - v * (math.hypot(1, x / v) - 1)

    last = bisect.bisect_left(range(2**18), _TAIL_BITS * math.log(2) + 1, key=chernoff)
    weights = [1 << 240]
    before = 0
    for x in range(last, 0, -1):
        step = 2 * x * variance.denominator * weights[-1] // variance.numerator
        before, step = weights[-1], before + step
        weights.append(step)
    return weights[::-1]
