"""JAX keys of 256 bits over ChaCha20: private noise that nobody can search for or repeat.

All of `jax.random` takes them in place of threefry's keys, which hold 64 bits.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extended

from fedjax_llm_kernels.chacha import BLOCK_WORDS, keystream

_KEY_WORDS = 8
KEY_BYTES = 4 * _KEY_WORDS
# First word of the nonce: what a block of the keystream is for, so that no two uses share one.
_BITS, _SPLIT, _FOLD_IN = 1, 2, 3


def secret_key(
    secret: bytes | None = None, random: Callable[[int], bytes] = os.urandom
) -> jax.Array:
    """A JAX key from the operating system's generator.

    Formal guarantee: if ChaCha20 is a pseudorandom function of its block number and nonce and the
    32 bytes are uniform and secret, all that `jax.random` draws from keys derived by `fold_in` and
    `split` is computationally indistinguishable from independent uniform bits: every derived key
    and every block of bits is the function at a place of its own. What is made of the bits is
    `jax.random`'s: normal draws have float32's granularity (see `gaussian_noise_like`). Not
    covered: running time, and what remains in memory.

    Args:
        secret: 32 bytes, kept by a caller who has to repeat draws; drawn anew if None.
        random: a generator that nobody else can predict.

    Raises:
        ValueError: a secret of another length.
    """
    secret = random(KEY_BYTES) if secret is None else secret
    if len(secret) != KEY_BYTES:
        raise ValueError(f"a secret key has {KEY_BYTES} bytes, got {len(secret)}")
    words = jnp.asarray(np.frombuffer(secret, "<u4"))
    return jax.random.wrap_key_data(words, impl=CHACHA20)


def _derived(key_8: jax.Array, use: int, index: jax.Array | int) -> jax.Array:
    nonce = (use, jnp.asarray(index, jnp.uint32)[None], 0)
    return keystream(key_8, nonce, jnp.zeros((1,), jnp.uint32))[0, :_KEY_WORDS]


def _seed(seed: jax.Array) -> jax.Array:
    """JAX asks for it; a seed has too few bits to be a secret, so no key comes from one."""
    raise TypeError("secret keys come from `secret_key`, not from a seed")


def _split(key_8: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    indices_N = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32)
    derived_Nx8 = jax.vmap(lambda index: _derived(key_8, _SPLIT, index))(indices_N)
    return derived_Nx8.reshape(*shape, _KEY_WORDS)


def _fold_in(key_8: jax.Array, data: jax.Array | int) -> jax.Array:
    return _derived(key_8, _FOLD_IN, data)


def _random_bits(key_8: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    count = int(np.prod(shape))
    words = -(-count * bit_width // 32)
    blocks = max(1, -(-words // BLOCK_WORDS))
    stream = keystream(key_8, (_BITS, 0, 0), jnp.arange(blocks, dtype=jnp.uint32))
    words_W = stream.reshape(-1)[: max(words, 1)]
    if bit_width == 32:
        return words_W[:count].reshape(shape)
    if bit_width == 64:
        pairs = words_W.reshape(-1, 2).astype(jnp.uint64)
        return ((pairs[:, 0] << jnp.uint64(32)) | pairs[:, 1])[:count].reshape(shape)
    if bit_width not in (8, 16):
        raise ValueError(f"bits come in widths of 8, 16, 32 or 64, not {bit_width}")
    part = 32 // bit_width
    shifts = jnp.arange(part, dtype=jnp.uint32) * jnp.uint32(bit_width)
    mask = jnp.uint32(2**bit_width - 1)
    parts = ((words_W[:, None] >> shifts[None]) & mask).reshape(-1)[:count]
    return parts.astype(jnp.dtype(f"uint{bit_width}")).reshape(shape)


CHACHA20 = extended.define_prng_impl(
    key_shape=(_KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="fedjax_llm_chacha20",
    tag="cha",
)


def is_secret(key: jax.Array) -> bool:
    """Whether a key comes from `secret_key`."""
    return bool(jax.random.key_impl(key) == CHACHA20)
