"""The negacyclic number-theoretic transform and its inverse, in u32 words, on any platform.

Every butterfly pairs whole rows and works along contiguous lanes (see `ring_tables` for the order),
so the same code vectorises on a CPU, fills the lanes of a TPU and coalesces on a GPU.
"""

import jax
import jax.numpy as jnp

from .ring_arithmetic import Machine, Words, at_most_once, shoup
from .ring_parameters import Ring
from .ring_tables import Pair, Transform


def inverse_transform(
    ring: Ring, x_hat: jax.Array, twiddles: Transform, q_L: Words, machine: Machine
) -> jax.Array:
    """N times the inverse transform of words below 2q.

    Args:
      ring: Gives L and N.
      x_hat: u32[..., L, N] in [0, 2q), in the transform's order.
      twiddles: Those of the inverse.
      q_L: The primes.
      machine: Where it runs.

    Returns:
      u32[..., L, N] in [0, 2q): N times the coefficients, in natural order.
    """
    a, b = ring.lanes
    batch = x_hat.shape[:-1]
    x = x_hat.reshape(*batch, b, a)
    distance = 1
    while distance < b:
        m = b // (2 * distance)
        x = _inverse_level(x, m, twiddles.lanes_LxBxA, q_L, machine)
        distance *= 2
    x = jnp.swapaxes(x, -1, -2)
    distance = 1
    rows = Pair(twiddles.rows_LxA.w[:, :, None], twiddles.rows_LxA.shoup[:, :, None])
    while distance < a:
        m = a // (2 * distance)
        x = _inverse_level(x, m, rows, q_L, machine)
        distance *= 2
    # Fused with its consumer the last level would choose between its halves at each coefficient.
    return machine.settle(x).reshape(*batch, ring.size)


def forward_transform(
    ring: Ring, x: jax.Array, twiddles: Transform, q_L: Words, machine: Machine
) -> jax.Array:
    """The transform of words below 2q: u32[..., L, N] to u32[..., L, N] in [0, 2q)."""
    a, b = ring.lanes
    batch = x.shape[:-1]
    x = x.reshape(*batch, a, b)
    rows = Pair(twiddles.rows_LxA.w[:, :, None], twiddles.rows_LxA.shoup[:, :, None])
    m = 1
    while m < a:
        x = _forward_level(x, m, rows, q_L, machine)
        m *= 2
    x = jnp.swapaxes(x, -1, -2)
    m = 1
    while m < b:
        x = _forward_level(x, m, twiddles.lanes_LxBxA, q_L, machine)
        m *= 2
    return x.reshape(*batch, ring.size)


def _level(
    x: jax.Array, m: int, twiddles: Pair, q_L: Words
) -> tuple[jax.Array, jax.Array, Words, Words, Words]:
    """Upper and lower rows of m blocks, [..., L, m, h, C], and twiddles and q that broadcast."""
    *batch, limbs, rows, lanes = x.shape
    blocks = x.reshape(*batch, limbs, m, 2, rows // (2 * m), lanes)
    one = (1,) * len(batch)

    def fit(w: Words) -> Words:
        return w[:, m : 2 * m].reshape(*one, limbs, m, 1, w.shape[-1])

    return (
        blocks[..., 0, :, :],
        blocks[..., 1, :, :],
        fit(twiddles.w),
        fit(twiddles.shoup),
        q_L.reshape(*one, limbs, 1, 1, 1),
    )


def _inverse_level(x: jax.Array, m: int, twiddles: Pair, q_L: Words, machine: Machine) -> jax.Array:
    upper, lower, w, w_shoup, q = _level(x, m, twiddles, q_L)
    total = at_most_once(upper + lower, 2 * q)
    difference = shoup(upper + (2 * q - lower), w, w_shoup, q, machine.mulhi)
    return jnp.stack([total, difference], axis=-3).reshape(x.shape)


def _forward_level(x: jax.Array, m: int, twiddles: Pair, q_L: Words, machine: Machine) -> jax.Array:
    upper, lower, w, w_shoup, q = _level(x, m, twiddles, q_L)
    product = shoup(lower, w, w_shoup, q, machine.mulhi)
    return jnp.stack(
        [at_most_once(upper + product, 2 * q), at_most_once(upper + (2 * q - product), 2 * q)],
        axis=-3,
    ).reshape(x.shape)
