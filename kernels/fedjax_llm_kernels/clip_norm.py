"""Arrays shortened to an l2 norm that float32 rounding cannot push them beyond.

Letters: P elements of an array.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# The float32 norm below is off by at most a relative 896 u / 2 + 10 u < 2^-15 (u = 2^-24): sums are
# taken in blocks of 128, so no partial sum has more than 128 * 7 terms behind it for trees of up to
# 2^31 elements per leaf and 2^14 leaves. Twice that is left as the margin.
_BLOCK = 128
MARGIN = 1.0 + 2.0**-14
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
    peak_bits = jnp.stack([_magnitude_bits(array).max() for array in arrays]).max()
    finite = peak_bits < jnp.uint32(_INFINITE)
    normal = finite & (peak_bits >= jnp.uint32(_NORMAL))
    shrink, grow = _powers_of_two(jnp.where(normal, peak_bits, _magnitude_bits(jnp.float32(1))))
    return shrink, grow, normal, finite


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
    | bound is zero, negative or NaN         | all zeros              | the norm      |

    Args:
        arrays: float32 of any shapes.
        bound: [] float32, in the unit of the arrays.

    Returns:
        The clipped arrays and the norm before clipping ([] float32).
    """
    full = [array for array in arrays if array.size]
    if not full:
        return list(arrays), jnp.float32(0)
    bound = jnp.asarray(bound, jnp.float32)
    bound = jnp.where(bound > 0, bound, jnp.float32(0))  # NaN compares false

    shrink, grow, normal, finite = scaled(full)
    sums = [block_sum(jnp.square(array * shrink).reshape(-1)) for array in full]
    relative = jnp.sqrt(block_sum(jnp.stack(sums)))  # norm * shrink, between 1 and 4 sqrt(P)
    norm = jnp.where(normal, grow * relative, jnp.where(finite, jnp.float32(0), jnp.inf))

    margin = jnp.float32(MARGIN)
    keep = (norm * margin <= bound) | jnp.isinf(bound)
    scale = bound / jnp.where(normal, relative * margin, jnp.float32(1))

    def one(array: jax.Array) -> jax.Array:
        shortened = jnp.where(keep, array, (array * shrink) * scale)
        return jnp.where(normal, shortened, jnp.float32(0))

    return [one(array) for array in arrays], norm
