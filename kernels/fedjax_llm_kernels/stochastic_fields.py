"""What all forms of `quantise_pack` share: a number's field of bits, and where it goes in a stream.

In signed 32-bit integers, which every Pallas platform has; a field has at most 16 bits, and words
are put together with shifts and ors, where signs do not matter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

GROUP = 32
_SIGN = -(2**31)


def fields(
    y: jax.Array, random: jax.Array, inverse: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """The field n + m of each number, in [0, 2 m], and whether it is not finite, as 0 or 1.

    Args:
      y: float32 of any shape.
      random: uint32 of that shape.
      inverse: float32 1 / step, a scalar or of a shape that broadcasts.
      bits: b.

    Returns:
      Two int32 arrays of y's shape.
    """
    largest = 2 ** (bits - 1) - 1
    finite = jnp.abs(y) < jnp.float32(jnp.inf)
    size = jnp.minimum(
        jnp.abs(jnp.where(finite, y, jnp.float32(0))) * inverse, jnp.float32(largest)
    )
    low = jnp.floor(size)
    up = _below(jax.lax.bitcast_convert_type(random, jnp.int32), _threshold(size - low))
    number = low.astype(jnp.int32) + up.astype(jnp.int32)
    number = jnp.where(y < jnp.float32(0), -number, number)
    field = jnp.where(finite, number, jnp.int32(0)) + jnp.int32(largest)
    return field, jnp.where(finite, jnp.int32(0), jnp.int32(1))


def _threshold(part: jax.Array) -> jax.Array:
    """floor(part * 2^32) for a part in [0, 1), as the bits of an int32.

    In two halves: not every platform converts to unsigned integers. Both are exact, as a product
    with a power of two and the difference of a float32 and its floor are.
    """
    scaled = part * jnp.float32(2.0**16)
    high = jnp.floor(scaled)
    low = (scaled - high) * jnp.float32(2.0**16)
    return (high.astype(jnp.int32) << 16) | low.astype(jnp.int32)


def _below(one: jax.Array, other: jax.Array) -> jax.Array:
    """Whether the bits of one are a smaller unsigned number."""
    return (one ^ jnp.int32(_SIGN)) < (other ^ jnp.int32(_SIGN))


def pieces(word: int, bits: int) -> list[tuple[int, int]]:
    """Which of 32 numbers reach into a word of theirs, and by what left shift (right if negative).

    >>> pieces(0, 12)
    [(0, 20), (1, 8), (2, -4)]
    """
    first, last = 32 * word // bits, (32 * word + 31) // bits
    return [(place, 32 * (word + 1) - bits * (place + 1)) for place in range(first, last + 1)]


def word_of(field_at: Callable[[int], jax.Array], word: int, bits: int) -> jax.Array:
    """A word of each group, from the fields of the group's numbers at a place.

    Args:
      field_at: Gives the fields of number `place` of all groups, int32 of any shape.
      word: Which of the b words of a group.
      bits: b.

    Returns:
      int32 of that shape.
    """
    found = None
    for place, shift in pieces(word, bits):
        field = field_at(place)
        part = field << shift if shift >= 0 else field >> -shift
        found = part if found is None else found | part
    assert found is not None
    return found


def filled(x_M: jax.Array, block: int) -> jax.Array:
    """The vector with zeros up to whole blocks."""
    fill = -x_M.shape[0] % block
    return jnp.pad(x_M, (0, fill)) if fill else x_M
