"""Stochastic rounding to few bits, with one step that all clients share.

The integers of all clients add up exactly; their errors are independent, with mean zero, and
average out. The rounding's key is each client's own, another one each round: a key that is shared
would give all clients the same error. It needs no secrecy, since every outcome keeps the norm.

| symbol | name | meaning |
|---|---|---|
| b | ``bits`` | bits of one number, sign included |
| m | ``max_int`` | 2^(b-1) - 1 |
| d | ``step`` | what one integer stands for |
| M | ``count`` | numbers of a vector |
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import Refused, UserError
from fedjax_llm_kernels.clip_norm import MARGIN, block_sum

# Never a valid integer; the value by which secure sums know a number that cannot be sent.
INVALID = -(2**31)
FEWEST_BITS, MOST_BITS = 2, 16
# Draws of `quantise_within` before it rounds towards zero.
_DRAWS = 8


def check_bits(bits: int) -> None:
    """Raises UserError for a width that is not offered."""
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise UserError(
            f"bits of stochastic rounding must be in [{FEWEST_BITS}, {MOST_BITS}], got {bits}; "
            "8 loses next to nothing after a rotation"
        )


def largest_integer(bits: int) -> int:
    """m.

    >>> largest_integer(4), largest_integer(8)
    (7, 127)
    """
    check_bits(bits)
    return 2 ** (bits - 1) - 1


def step_for(bound: float, bits: int) -> float:
    """d = c / m, for numbers of at most c = `bound` in absolute value.

    Not rounded to a power of two, as fixed point of many bits is: of four bits that could cost one.

    Raises:
        UserError: a bound that is not positive and finite, or that float32 cannot hold.
    """
    step = bound / largest_integer(bits)
    if not (math.isfinite(step) and 2.0**-100 <= step <= 2.0**100):
        raise UserError(f"the bound of rounded numbers must be in (0, 2^100], got {bound:g}")
    return step


def least_error_cut(bits: int, clients: int = 1) -> float:
    """Where to cut normal numbers so that the mean of K clients' roundings has the least error.

    In standard deviations c: it minimises E d^2 f (1 - f) / K + E (|z| - c)+^2, with the step
    d = c / m, f the part of |z| / d beyond its floor, and z normal. The first is the variance of
    stochastic rounding, which K clients share; the second, what is cut, is common to all.

    >>> [round(least_error_cut(bits, 8), 1) for bits in (2, 4, 8)]
    [1.7, 2.9, 4.2]

    Raises:
        UserError: bits out of range, or no client.
    """
    largest = largest_integer(bits)
    if clients < 1:
        raise UserError(f"clients of a mean must be at least 1, got {clients}")
    z_N = np.linspace(0.0, 10.0, 20_001)
    density_N = np.exp(-(z_N**2) / 2)
    density_N /= density_N.sum()

    def error(cut: float) -> float:
        size_N = np.minimum(z_N, cut) * (largest / cut)
        part_N = size_N - np.floor(size_N)
        rounding_N = (cut / largest) ** 2 * part_N * (1 - part_N) / clients
        return float(density_N @ (rounding_N + np.maximum(z_N - cut, 0.0) ** 2))

    return float(min(np.arange(1.0, 8.0, 0.05), key=error))


def quantise(key: jax.Array, y: jax.Array, step: float | jax.Array, max_int: int) -> jax.Array:
    """Rounds to one of the two neighbouring multiples of the step, at random.

    Formal guarantee, in exact products with 1 / d (float32's are off by a relative 2^-23): inside
    of the range d m the mean over the key of d times the result is y to within 2^-32 d, the two
    neighbours alone come up, and numbers of the result are independent.

    | y | result |
    |---|---|
    | 0, -0, a multiple of d | that multiple, always |
    | beyond d m, finite | m or -m: shortened, and biased |
    | NaN, infinite | ``INVALID``, which every secure sum and `pack` refuse |

    Args:
        key: of this client, this round and this stage.
        y: float32 of any shape.
        step: d, above 0.
        max_int: m, at most 2^15 - 1.

    Returns:
        int32 of y's shape.
    """
    size, finite = _in_steps(y, step, max_int)
    # On absolute values, so that the part beyond the floor is exact in float32 and so is its
    # comparison with 32 random bits.
    low = jnp.floor(size)
    threshold = ((size - low) * jnp.float32(2.0**32)).astype(jnp.uint32)
    up = jax.random.bits(key, y.shape, jnp.uint32) < threshold
    return _signed(low.astype(jnp.int32) + up.astype(jnp.int32), y, finite)


def quantise_within(
    key: jax.Array, y: jax.Array, step: float | jax.Array, max_int: int, norm: float | jax.Array
) -> jax.Array:
    """As `quantise`, and no longer than `norm` whatever comes up.

    Conditional rounding (arXiv 2102.06387, algorithm 1): rounds anew until the vector is short
    enough. After eight draws it rounds towards zero, which never lengthens.

    Formal guarantee: where (1 + 2^-20) norm(y) <= `norm`, the l2 norm of d times the result is at
    most `norm`, always; so a sensitivity that noise is calibrated to holds for what is sent. With
    norm(y) <= C and `norm` = `longest(C, M, d, failure)`, or rather (1 + 2^-14) times that, by
    which float32's sums are distrusted here, one draw is too long with a probability of at most
    q = `failure`. The bias that this brings has an l2 norm of at most
    d sqrt(M) (q / (1 - q) + q^8), since what is left out lies within d sqrt(M) of the mean.

    A vector that is not finite holds ``INVALID`` and nothing else of it is promised.

    Args:
        key: of this client, this round and this stage.
        y: float32 [M].
        step: d, above 0.
        max_int: m.
        norm: in the unit of y.
    """
    size, finite = _in_steps(y, step, max_int)
    shortest = _signed(jnp.floor(size).astype(jnp.int32), y, finite)
    bound = jnp.asarray(norm, jnp.float32) / jnp.asarray(step, jnp.float32)

    def too_long(ints_M: jax.Array) -> jax.Array:
        squares_M = jnp.square(ints_M.astype(jnp.float32))
        return jnp.sqrt(block_sum(squares_M)) * jnp.float32(MARGIN) > bound

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, draw = carry
        return quantise(jax.random.fold_in(key, draw), y, step, max_int), draw + 1

    first = again((shortest, jnp.int32(0)))
    ints_M, _ = jax.lax.while_loop(
        lambda carry: too_long(carry[0]) & (carry[1] < _DRAWS) & jnp.all(finite), again, first
    )
    return jnp.where(too_long(ints_M), shortest, ints_M)


def dequantise(ints: jax.Array, step: float | jax.Array) -> jax.Array:
    """d times the integers, or times a sum of them; float32."""
    return ints.astype(jnp.float32) * jnp.asarray(step, jnp.float32)


def longest(norm: float, count: int, step: float, failure: float = 0.0) -> float:
    """The l2 norm that stochastic rounding can bring a vector to.

    Formal guarantee: the rounded vector is no longer than this, but for a probability of at most
    `failure`; with 0, always. The lesser of two bounds (arXiv 2102.06387, proposition 22):

    - norm + d sqrt(M), always: every coordinate moves by less than d.
    - the root of norm^2 + d^2 M / 4 + sqrt(2 ln(1 / failure)) d (norm + d sqrt(M) / 2). Proof, in
      steps: coordinate z between l and l + 1 has the mean square z^2 + f (1 - f) with f = z - l, at
      most z^2 + 1/4; its square takes one of two values 2 l + 1 apart, at most 2 z + 1, and the
      vector of these is no longer than 2 norm + sqrt(M), so that Hoeffding's inequality gives the
      rest.

    Args:
        norm: of the vector before.
        count: M.
        step: d.
        failure: in [0, 1).
    """
    if not 0 <= failure < 1:
        raise UserError(f"failure must be in [0, 1), got {failure:g}; 0 is the certain bound")
    root = step * math.sqrt(count)
    always = norm + root
    if failure == 0:
        return always
    likely = norm**2 + root**2 / 4
    likely += math.sqrt(-2 * math.log(failure)) * step * (norm + root / 2)
    return min(always, math.sqrt(likely))


def norm_before_rounding(clip_norm: float, count: int, step: float, failure: float = 0.0) -> float:
    """The l2 norm to clip to so that `longest` is at most the clip norm: its inverse.

    With `failure` above 0 the promise needs `quantise_within`.

    Raises:
        Refused: rounding alone can use up the whole norm.
    """
    low, high = 0.0, clip_norm
    if not longest(low, count, step, failure) < clip_norm:
        raise Refused(
            f"rounding {count} numbers to steps of {step:g} can lengthen a message beyond the clip "
            f"norm {clip_norm:g}; use more bits, or rotate the message first"
        )
    # `longest` grows with the norm; sixty halvings exhaust float64.
    for _ in range(60):
        middle = (low + high) / 2
        if longest(middle, count, step, failure) <= clip_norm:
            low = middle
        else:
            high = middle
    return low


def _in_steps(y: jax.Array, step: float | jax.Array, max_int: int) -> tuple[jax.Array, jax.Array]:
    """Absolute values in steps, cut at m, zero where y is not finite; and whether it is."""
    finite = jnp.isfinite(y)
    inverse = 1 / jnp.asarray(step, jnp.float32)
    size = jnp.abs(jnp.where(finite, y, jnp.float32(0))) * inverse
    return jnp.minimum(size, jnp.float32(max_int)), finite


def _signed(size: jax.Array, y: jax.Array, finite: jax.Array) -> jax.Array:
    return jnp.where(finite, jnp.where(y < 0, -size, size), jnp.int32(INVALID))
