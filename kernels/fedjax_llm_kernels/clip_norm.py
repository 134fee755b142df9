"""Arrays shortened to an l2 norm that float32 rounding cannot push them beyond.

Letters: P elements of an array.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The float32 norm below is off by at most a relative 896 u / 2 + 10 u < 2^-15 (u = 2^-24): sums are
# taken of 32 parts and then in blocks of 128, so no partial sum has more than 128 * 7 terms behind
# it for trees of up to 2^31 elements per leaf and 2^14 leaves. Twice that is left as the margin.
_BLOCK = 128
# Parts of an array that are taken together elementwise.
_PARTS = 32
MARGIN = 1.0 + 2.0**-14
# Elements below the least normal number may be flushed where the norm is measured and not where
# they are returned. 2^45 of them have a norm below 2^-103, which the margin covers for bounds from
# here on.
LEAST_BOUND = 2.0**-96
# Bits of float32 without the sign: the exponent of the least normal number, and infinity.
_NORMAL, _INFINITE = 0x00800000, 0x7F800000


def block_sum(x_P: jax.Array) -> jax.Array:
    """Sum of a float32 vector with an error bound that does not grow with its length."""
    while x_P.size > 1:
        pad = -x_P.size % _BLOCK
        # The barrier keeps XLA from merging the levels into one long sequential sum, which would
        # stop growing at 2^24 equal terms and so understate the norm.
        x_P = jax.lax.optimization_barrier(
            jnp.pad(x_P, (0, pad)).reshape(-1, _BLOCK).sum(axis=1, dtype=jnp.float32)
        )
    return x_P.reshape(-1).sum()


def _powers_of_two(peak_bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """2^-k and 2^k, both normal float32, with 1 <= peak * 2^-k < 4 for a normal peak.

    Dividing by the peak would not do: XLA turns that into a product with the reciprocal, which is
    denormal above 2^126 and flushed to zero, and the norm of a huge tree with it.
    """
    exponent = jnp.clip(peak_bits >> jnp.uint32(23), jnp.uint32(1), jnp.uint32(253))
    pair = ((jnp.uint32(254) - exponent) << jnp.uint32(23), exponent << jnp.uint32(23))
    shrink, grow = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in pair)
    return shrink, grow


def scaled(arrays: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Powers of two that bring the largest magnitude near one, and what kind of values there are.

    Args:
        arrays: float32 of any shapes, at least one of them, none of them empty.

    Returns:
        `shrink` and `grow` = 1 / `shrink`, both 1 for values that are not normal; whether the
        largest magnitude is finite and normal (bool), and whether all values are finite (bool).
    """
    # Magnitudes order as their bits do, with infinity and then NaN on top: one exact pass, which
    # does not rest on what a float maximum makes of NaN.
    peak_bits = jnp.stack([_largest(array) for array in arrays]).max()
    finite = peak_bits < jnp.uint32(_INFINITE)
    normal = finite & (peak_bits >= jnp.uint32(_NORMAL))
    shrink, grow = _powers_of_two(jnp.where(normal, peak_bits, _magnitude_bits(jnp.float32(1))))
    return shrink, grow, normal, finite


def _parts(array: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """A vector as 32 parts of one length, and what is left, fewer than 32 elements.

    What is made of each part, and then of all elementwise, XLA computes in one loop. Of a reduction
    over a long axis it makes, on a CPU, an array of what is reduced and then one number after the
    other: 20 times slower where that array leaves the cache.
    """
    array_P = array.reshape(-1)
    length = array_P.size // _PARTS
    parts = [array_P[part * length : (part + 1) * length] for part in range(_PARTS)]
    return parts, array_P[_PARTS * length :]


def _largest(array: jax.Array) -> jax.Array:
    """The largest magnitude, as bits."""
    parts, rest = _parts(array)
    top = functools.reduce(jnp.maximum, [_magnitude_bits(part) for part in parts])
    top = jax.lax.optimization_barrier(top)
    return jnp.maximum(top.max(initial=0), _magnitude_bits(rest).max(initial=0))


def _sum_of_squares(array: jax.Array, shrink: jax.Array) -> jax.Array:
    """Of array * shrink: 32 terms at a time, and those sums as `block_sum` has it."""
    parts, rest = _parts(array)
    sums = functools.reduce(jnp.add, [jnp.square(part * shrink) for part in parts])
    return block_sum(jax.lax.optimization_barrier(sums)) + jnp.square(rest * shrink).sum()


def _magnitude_bits(x: jax.Array) -> jax.Array:
    bits: jax.Array = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits & jnp.uint32(0x7FFFFFFF)


def clip_arrays(
    arrays: Sequence[jax.Array], bound: float | jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Scales arrays down to an l2 norm of at most `bound` over all of them together.

    Formal guarantee: for every input, the norm of what is returned, read as the float32 values
    returned, is at most `bound` as a real number. The norm is computed in float32 and taken to be
    larger by a factor of 1 + 2^-14, which exceeds its worst-case rounding error, so what is
    shortened is shorter than `bound` by up to that factor. Values are scaled by a power of two near
    the largest magnitude, so that their squares neither overflow nor vanish.

    | input                                  | output                 | norm reported |
    |----------------------------------------|------------------------|---------------|
    | all zeros, or no arrays, or no elements| unchanged              | 0             |
    | norm (with margin) <= bound            | unchanged              | the norm      |
    | finite, however large                  | scaled to bound        | the norm, inf above 3.4e38 |
    | any array holds NaN or inf             | all zeros              | inf           |
    | all magnitudes below 1.2e-38 (denormal)| all zeros              | 0             |
    | bound is inf                           | unchanged              | the norm      |
    | bound below 2^-96 = 1.3e-29, or NaN    | all zeros              | the norm      |

    Args:
        arrays: float32 of any shapes.
        bound: [] float32, in the unit of the arrays.

    Returns:
        The clipped arrays and the norm before clipping ([] float32).
    """
    full = [array for array in arrays if array.size]
    if not full:
        return list(arrays), jnp.float32(0)
    how, norm = measured(full, bound)
    return [shorten(array, how) for array in arrays], norm


class Shortening(NamedTuple):
    """What an array of a tree is multiplied by; all [].

    Attributes:
        keep: bool, whether it stays as it is.
        shrink: a power of two that is applied first.
        scale: what is applied then.
        normal: bool; where it is not, the array becomes zeros.
    """

    keep: jax.Array
    shrink: jax.Array
    scale: jax.Array
    normal: jax.Array


def measured(arrays: Sequence[jax.Array], bound: float | jax.Array) -> tuple[Shortening, jax.Array]:
    """How `clip_arrays` shortens arrays, none of them empty, and their norm ([] float32)."""
    shrink, grow, normal, finite = scaled(arrays)
    sums = [_sum_of_squares(array, shrink) for array in arrays]
    relative = jnp.sqrt(block_sum(jnp.stack(sums)))  # norm * shrink, between 1 and 4 sqrt(P)
    return shortening(bound, shrink, grow, normal, finite, relative)


def shortening(
    bound: float | jax.Array,
    shrink: jax.Array,
    grow: jax.Array,
    normal: jax.Array,
    finite: jax.Array,
    relative: jax.Array,
) -> tuple[Shortening, jax.Array]:
    """From what `scaled` returns, and the norm times `shrink`; shapes broadcast."""
    bound = jnp.asarray(bound, jnp.float32)
    bound = jnp.where(bound >= LEAST_BOUND, bound, jnp.float32(0))  # NaN compares false
    norm = jnp.where(normal, grow * relative, jnp.where(finite, jnp.float32(0), jnp.inf))

    margin = jnp.float32(MARGIN)
    keep = (norm * margin <= bound) | jnp.isinf(bound)
    scale = bound / jnp.where(normal, relative * margin, jnp.float32(1))
    return Shortening(keep, shrink, scale, normal), norm


def shorten(array: jax.Array, how: Shortening) -> jax.Array:
    """An array of a tree, shortened as the tree is."""
    shortened = jnp.where(how.keep, array, (array * how.shrink) * how.scale)
    return jnp.where(how.normal, shortened, jnp.float32(0))
