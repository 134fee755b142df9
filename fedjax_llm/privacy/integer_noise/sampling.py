"""Draws from a noise table: from a JAX key for simulation, from a secret stream otherwise."""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedjax_llm.errors import UserError

from .tables import LIMBS, WORD_BITS, NoiseTable

_KEY_BYTES = 32
# Draws made at a time: their words and the intermediate arrays stay in the processor's cache.
_CHUNK = 2**15


def draw(table: NoiseTable, key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Noise for simulation. Pure; for `jit` (with `shape` static) and `vmap` over keys.

    Formal guarantee: none towards anyone who knows the run's seed or can search the 64 bits of a
    threefry key: noise from a JAX key can be taken off again. For uniform words the distribution
    is within 2^-78 of that of `draw_secret` (three limbs are compared), and every draw is within
    the bound: what a simulation needs.

    Args:
        table: of the share's distribution.
        key: a JAX key that is used for nothing else.
        shape: of the result; may be empty.

    Returns:
        int32 of that shape, independent draws within `table.bound`.
    """
    words = jax.random.bits(key, (3, *shape), jnp.uint32)
    return _select(table, words[0], words[1], words[2])


def _select(table: NoiseTable, high: jax.Array, middle: jax.Array, last: jax.Array) -> jax.Array:
    """The values that three uniform uint32 words of one shape select, the rest taken as zeros."""
    column_bits = table.column_bits
    column = (last & jnp.uint32((1 << column_bits) - 1)).astype(jnp.int32)
    low = last >> jnp.uint32(column_bits)
    keep = jnp.asarray(table.keep_6xL)
    keep_high, keep_middle, keep_low = (keep[limb][column] for limb in range(3))
    below = (middle < keep_middle) | ((middle == keep_middle) & (low < keep_low))
    kept = (high < keep_high) | ((high == keep_high) & below)
    return jnp.where(kept, column, jnp.asarray(table.alias_L)[column]) - jnp.int32(table.bound)


def draw_secret(
    table: NoiseTable, count: int, random: Callable[[int], bytes] = os.urandom
) -> NDArray[np.int64]:
    """Noise for a deployment, from the operating system's generator.

    Formal guarantee: if AES-256 in counter mode is a pseudorandom generator and `random` yields
    uniform bytes, the draws are indistinguishable, by any feasible computation, from independent
    ones of the table's distribution. The key is drawn anew by every call and kept nowhere. Not
    covered: running time and memory access, which depend on the draws as in any table look-up;
    what remains in memory.

    Args:
        table: of the share's distribution.
        count: draws, P.
        random: bytes of a generator that nobody else can predict.

    Returns:
        int64 [P] within `table.bound`.

    Raises:
        UserError: count is negative.
    """
    if count < 0:
        raise UserError(f"the number of draws must not be negative, got {count}")
    cipher = Cipher(algorithms.AES(random(_KEY_BYTES)), modes.CTR(bytes(16)))
    stream = cipher.encryptor()
    table = jax.tree.map(np.asarray, table)
    high_L, middle_L = (row.astype(np.uint64) for row in table.keep_6xL[:2])
    keep_L = high_L << np.uint64(WORD_BITS) | middle_L
    values_P = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        part_P = values_P[start : start + _CHUNK]
        size = part_P.size
        block = stream.update(bytes(12 * size))
        words_P = np.frombuffer(block, "<u8", size)
        last_P = np.frombuffer(block, "<u4", size, offset=8 * size)
        part_P[:] = _select_host(
            table, keep_L, words_P, last_P, lambda length: stream.update(bytes(length))
        )
    return values_P


def _select_host(
    table: NoiseTable,
    keep_L: NDArray[np.uint64],
    words_P: NDArray[np.uint64],
    last_P: NDArray[np.uint32],
    more: Callable[[int], bytes],
) -> NDArray[np.int64]:
    """The values that words select: the first two of each draw in `words_P`, the third in
    `last_P`, the others from `more`. `keep_L` holds the first two limbs."""
    column_P = (last_P & np.uint32(table.alias_L.shape[0] - 1)).astype(np.int64)
    threshold_P = keep_L[column_P]
    kept_P = words_P < threshold_P
    for tie in np.nonzero(words_P == threshold_P)[0]:  # once in 2^64 draws
        limbs = [int(limb) for limb in table.keep_6xL[2:, column_P[tie]]]
        number = [int(last_P[tie]) >> table.column_bits]
        if number[0] == limbs[0]:
            number += np.frombuffer(more(4 * (LIMBS - 3)), "<u4").tolist()
        kept_P[tie] = number < limbs
    return np.where(kept_P, column_P, table.alias_L[column_P]) - table.bound
