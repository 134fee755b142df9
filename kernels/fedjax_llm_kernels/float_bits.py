"""float32 numbers by their bits, in signed 32-bit integers, which every Pallas platform has.

Without their sign bit, magnitudes order as their bits do, with infinity and then NaN on top. All
functions are elementwise.
"""

import jax
import jax.numpy as jnp

# The least normal number, and infinity.
_NORMAL, _INFINITE = 0x00800000, 0x7F800000


def magnitude_bits(x: jax.Array) -> jax.Array:
    """int32: the bits of |x|."""
    bits: jax.Array = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits & jnp.int32(0x7FFFFFFF)


def normal_and_finite(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a magnitude: whether it is normal and finite, and whether it is finite (bool)."""
    finite = bits < jnp.int32(_INFINITE)
    return finite & (bits >= jnp.int32(_NORMAL)), finite


def exponent(bits: jax.Array) -> jax.Array:
    """e in [1, 253]: a normal magnitude times 2^(127 - e) is in [1, 4), and both are normal."""
    # Written out: not every Pallas platform lowers `clip`.
    return jnp.minimum(jnp.maximum(bits >> 23, jnp.int32(1)), jnp.int32(253))


def power_of_two(power: jax.Array) -> jax.Array:
    """2^power as float32, for an int32 power of at most 127; 0 where it would not be normal."""
    biased = jnp.maximum(power + 127, jnp.int32(0))
    number: jax.Array = jax.lax.bitcast_convert_type(biased << 23, jnp.float32)
    return number
