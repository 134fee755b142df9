"""Arithmetic modulo a prime q < 2^27 in 32-bit words, after Shoup and Barrett.

No 64-bit integer appears: the high half of a 32 x 32 product is one instruction (`jax.lax.mulhi`)
or is put together from 16-bit halves, whichever the platform does well.

A Shoup pair of a constant w < q is (w, w') with w' = floor(w 2^32 / q). For every 32-bit x

    x w - floor(x w' / 2^32) q    is x w mod q or q more, so below 2q.

Words between 0 and 2^32 therefore need no reduction before a product, and 27-bit primes leave five
bits of room for sums. With w' smaller by d the result is below (1 + (d + 1) x / 2^32) q.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# u32, of JAX, or of numpy where it comes from a table.
Words = Any
MulHi = Callable[[Words, Words], jax.Array]


class Machine(NamedTuple):
    """What the arithmetic needs to know about where it runs.

    `settle` keeps a compiler from merging what comes before with what comes after: XLA on a CPU
    otherwise computes a residue again for every plane of bits that it goes into.
    """

    mulhi: MulHi
    settle: Callable[[Any], Any]


def mulhi_by_halves(x: Words, y: Words) -> jax.Array:
    """High 32 bits of the product of two u32 arrays, from four 16 x 16 products."""
    mask = jnp.uint32(0xFFFF)
    x0, x1, y0, y1 = x & mask, x >> 16, y & mask, y >> 16
    # No sum here passes 2^32: (2^16 - 1)^2 + 2 (2^16 - 1) = 2^32 - 1.
    middle = x1 * y0 + (x0 * y0 >> 16)
    return x1 * y1 + (middle >> 16) + ((middle & mask) + x0 * y1 >> 16)


def mulhi_native(x: Words, y: Words) -> jax.Array:
    """The same by `jax.lax.mulhi`, where this JAX has it: one instruction on a CPU."""
    return jax.lax.mulhi(x, y) if hasattr(jax.lax, "mulhi") else mulhi_by_halves(x, y)


def shoup(x: jax.Array, w: Words, w_shoup: Words, q: Words, mulhi: MulHi) -> jax.Array:
    """x * w mod q, in [0, 2q), for any u32 x and an exact Shoup pair; the shapes broadcast."""
    return x * w - mulhi(x, w_shoup) * q


def at_most_once(x: jax.Array, q: Words) -> jax.Array:
    """x mod q for x in [0, 2q): unsigned, x - q wraps above x exactly when x < q."""
    return jnp.minimum(x, x - q)


def barrett(x: jax.Array, q: Words, q_barrett: Words, mulhi: MulHi) -> jax.Array:
    """x mod q plus 0 or q, for any u32 x; `q_barrett` = floor(2^32 / q)."""
    return x - mulhi(x, q_barrett) * q


def canonical(x: jax.Array, q: Words, q_barrett: Words, mulhi: MulHi) -> jax.Array:
    """x mod q in [0, q), for any u32 x."""
    return at_most_once(barrett(x, q, q_barrett, mulhi), q)


def _keep(x: Any) -> Any:
    return x


CPU = Machine(mulhi_native, jax.lax.optimization_barrier)
ACCELERATOR = Machine(mulhi_by_halves, _keep)
