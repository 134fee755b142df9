"""The ChaCha20 keystream (RFC 8439) on the device, many blocks side by side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# "expand 32-byte k", RFC 8439 section 2.3.
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
BLOCK_WORDS = 16


def keystream(
    key_words: jax.Array, nonce_words: Sequence[int | jax.Array], counters_B: jax.Array
) -> jax.Array:
    """Computes blocks of the ChaCha20 keystream.

    A keystream is public expansion here (of the shared polynomial): this function makes no promise
    about timing or about what remains in memory.

    Args:
      key_words: u32[8], the key's bytes as little-endian words.
      nonce_words: The three words of the nonce: Python integers below 2^32, or u32[B] for a nonce
        of each block's own.
      counters_B: u32[B], the block counters.

    Returns:
      u32[B, 16]: the words of each block; their little-endian bytes are the keystream.
    """
    blocks = counters_B.shape[0]
    constants = jnp.array(np.array(_CONSTANTS, np.uint32))
    nonce = [jnp.broadcast_to(jnp.asarray(word, jnp.uint32), (blocks,)) for word in nonce_words]

    def rows(words_4: jax.Array) -> jax.Array:
        return jnp.broadcast_to(words_4[:, None], (4, blocks))

    start = (
        rows(constants),
        rows(key_words[:4]),
        rows(key_words[4:]),
        jnp.stack([counters_B, *nonce]),
    )

    def double_round(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, c, d = _quarter_rounds(*state)
        # The diagonals of the 4 x 4 state become columns, and back.
        b, c, d = _turn(b, 1), _turn(c, 2), _turn(d, 3)
        a, b, c, d = _quarter_rounds(a, b, c, d)
        return a, _turn(b, 3), _turn(c, 2), _turn(d, 1)

    state = jax.lax.fori_loop(0, 10, double_round, start)
    final = jnp.stack([x + y for x, y in zip(state, start, strict=True)])
    return final.reshape(BLOCK_WORDS, blocks).T


def _quarter_rounds(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    # Without barriers XLA on a CPU computes the chain again for each of the four rows.
    settle = jax.lax.optimization_barrier
    a = settle(a + b)
    d = settle(_rotate(d ^ a, 16))
    c = settle(c + d)
    b = settle(_rotate(b ^ c, 12))
    a = settle(a + b)
    d = settle(_rotate(d ^ a, 8))
    c = settle(c + d)
    b = settle(_rotate(b ^ c, 7))
    return a, b, c, d


def _rotate(x: jax.Array, bits: int) -> jax.Array:
    return (x << bits) | (x >> (32 - bits))


def _turn(x: jax.Array, rows: int) -> jax.Array:
    return jnp.concatenate([x[rows:], x[:rows]], axis=0)
