"""One number of every T neighbours: a mask without sorting, and of static size.

A vector of P numbers is cut into M = ceil(P / T) strata of T neighbours, and of each stratum one
number is taken. The last stratum may be incomplete: where its turn comes to a place that is not
there, zero is sent. Everything is broadcasts and comparisons, no scatter: the same bytes on every
device.

Letters: P numbers, M strata, T numbers of a stratum.
"""

import jax
import jax.numpy as jnp

from fedjax_llm.compression.codec import Facts
from fedjax_llm.errors import UserError


def strata(count: int, one_in: int) -> int:
    """M.

    >>> strata(10, 4), strata(8, 4)
    (3, 2)
    """
    return -(-count // one_in)


def sampling_facts(one_in: int, unbiased: bool, inside: str) -> Facts:
    """Of a codec that sends one of every T coordinates: a projection, or unbiased."""
    all_sent = one_in == 1
    return Facts(
        unbiased=unbiased or all_sent,
        projects=not unbiased or all_sent,
        steady=False,
        lossless_on="everything" if all_sent else "nothing" if unbiased else inside,
    )


def check_one_in(one_in: int, codec: str) -> None:
    """Raises UserError for a mask that would send more than everything."""
    if one_in < 1:
        raise UserError(
            f"one_in of {codec} must be at least 1, got {one_in}; 10 sends a tenth of the numbers"
        )


def drawn(key: jax.Array, count: int, one_in: int) -> jax.Array:
    """A random place in each stratum, int32 [M], uniform in [0, T)."""
    return jax.random.randint(key, (strata(count, one_in),), 0, one_in, jnp.int32)


def take(x_P: jax.Array, places_M: jax.Array, one_in: int) -> jax.Array:
    """The numbers at the places, [M]."""
    padded_P = jnp.pad(x_P, (0, places_M.shape[0] * one_in - x_P.shape[0]))
    x_MxT = padded_P.reshape(-1, one_in)
    return jnp.take_along_axis(x_MxT, places_M[:, None], axis=1)[:, 0]


def put(y_M: jax.Array, places_M: jax.Array, one_in: int, count: int) -> jax.Array:
    """The transpose of `take`: the numbers at their places among zeros, [P]."""
    here_MxT = jnp.arange(one_in, dtype=jnp.int32)[None] == places_M[:, None]
    x_MxT = jnp.where(here_MxT, y_M[:, None], jnp.float32(0))
    return x_MxT.reshape(-1)[:count]
