"""The randomised Hadamard rotation of any number of coordinates, in place of padding.

Additions and subtractions of two numbers and one product each at the end: no order of summation is
left to a compiler, so that the same key and numbers give the same bytes in every program.

Letters: P coordinates, N the largest power of two that is at most P.
"""

import jax
import jax.numpy as jnp

# Bits of a random word.
_WORD = 32
# Levels of the transform that one pass over memory does; four numbers fit registers.
_LEVELS = 2


def largest_power_of_two(count: int) -> int:
    """N for a count of at least 1.

    >>> [largest_power_of_two(count) for count in (1, 2, 3, 7, 8)]
    [1, 2, 2, 4, 8]
    """
    return 1 << (count.bit_length() - 1)


@jax.jit
def transform(x_N: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform, its own inverse, in O(N log N).

    Args:
        x_N: float32 [N], N a power of two.
    """
    size = x_N.shape[0]
    # A product before, fused with an addition here, would be rounded otherwise.
    x_N = jax.lax.optimization_barrier(x_N)
    distance = 1
    while distance < size:
        width = min(1 << _LEVELS, size // distance)
        x_N = _pass(x_N.reshape(-1, width, distance)).reshape(size)
        distance *= width
    return jax.lax.optimization_barrier(x_N * jnp.float32(size**-0.5))


def _pass(x_BxWxH: jax.Array) -> jax.Array:
    """A transform along the middle axis; kept apart so that XLA computes each number once."""
    rows = [x_BxWxH[:, row] for row in range(x_BxWxH.shape[1])]
    distance = 1
    while distance < len(rows):
        for row in range(len(rows)):
            if row & distance == 0:
                upper, lower = rows[row], rows[row | distance]
                rows[row], rows[row | distance] = upper + lower, upper - lower
        distance *= 2
    return jax.lax.optimization_barrier(jnp.stack(rows, axis=1))


@jax.jit
def rotate(key: jax.Array, x_P: jax.Array) -> jax.Array:
    """An orthonormal map of P coordinates to P coordinates, each a mixture of at least N.

    The first N are multiplied by random signs and transformed; then the last N, which overlap them
    unless N is P, with signs of their own.

    Args:
        key: the same key is the same map.
        x_P: float32 [P].
    """
    size = x_P.shape[0]
    if size == 0:
        return x_P
    block = largest_power_of_two(size)
    first, last = _signs(key, block)
    x_P = jnp.concatenate([transform(_flipped(x_P[:block], first)), x_P[block:]])
    if block < size:
        rest = size - block
        x_P = jnp.concatenate([x_P[:rest], transform(_flipped(x_P[rest:], last))])
    return x_P


@jax.jit
def unrotate(key: jax.Array, y_P: jax.Array) -> jax.Array:
    """The inverse of `rotate`, which is its transpose."""
    size = y_P.shape[0]
    if size == 0:
        return y_P
    block = largest_power_of_two(size)
    first, last = _signs(key, block)
    if block < size:
        rest = size - block
        y_P = jnp.concatenate([y_P[:rest], _flipped(transform(y_P[rest:]), last)])
    return jnp.concatenate([_flipped(transform(y_P[:block]), first), y_P[block:]])


def _signs(key: jax.Array, size: int) -> jax.Array:
    """Two rows of random bits, bool [2, N]."""
    words_2xWx1 = jax.random.bits(key, (2, -(-size // _WORD), 1), jnp.uint32)
    shifts_1x1xB = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
    bits_2xP = ((words_2xWx1 >> shifts_1x1xB) & jnp.uint32(1)).reshape(2, -1)
    return bits_2xP[:, :size] == 1


def _flipped(x_N: jax.Array, negative_N: jax.Array) -> jax.Array:
    return jnp.where(negative_N, -x_N, x_N)
