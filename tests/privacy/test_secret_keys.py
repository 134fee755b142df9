"""Keys over ChaCha20: OpenSSL's stream, blocks of its own for every use, and jax.random works."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from fedjax_llm.privacy.secret_keys import secret_key

SECRET = bytes(range(32))


def openssl(secret: bytes, nonce: tuple[int, int, int], words: int) -> np.ndarray:
    """RFC 8439: a counter of four bytes, then three words of nonce."""
    start = b"".join(word.to_bytes(4, "little") for word in (0, *nonce))
    stream = Cipher(algorithms.ChaCha20(secret, start), None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * words)), "<u4")


def data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def test_bits_and_derived_keys_are_openssls_stream() -> None:
    key = secret_key(SECRET)
    np.testing.assert_array_equal(
        jax.random.bits(key, (3, 11), jnp.uint32).reshape(-1), openssl(SECRET, (1, 0, 0), 33)
    )
    np.testing.assert_array_equal(data(jax.random.fold_in(key, 7)), openssl(SECRET, (3, 7, 0), 8))
    for index, split in enumerate(data(jax.random.split(key, 3))):
        np.testing.assert_array_equal(split, openssl(SECRET, (2, index, 0), 8))


def test_no_two_uses_share_a_block() -> None:
    key = secret_key(SECRET)
    found = [data(key), *data(jax.random.split(key, 4))]
    found += [data(jax.random.fold_in(key, n)) for n in (0, 1, 2, 2**32 - 1)]
    found += [np.asarray(jax.random.bits(key, (8,), jnp.uint32))]
    for one, other in itertools.combinations(found, 2):
        assert not np.any(one == other)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_bits_of_every_width_are_uniform(dtype: jnp.dtype) -> None:
    drawn = np.asarray(jax.random.bits(secret_key(SECRET), (5, 10_000), dtype))
    assert drawn.dtype == dtype
    counts = np.bincount(drawn.reshape(-1) & 15, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert jax.random.bits(secret_key(SECRET), (0,), dtype).shape == (0,)


def test_normal_draws_are_normal_in_programs_and_batches() -> None:
    keys = jax.random.split(secret_key(SECRET), 4)
    together = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (20_000,), jnp.float32)))(keys)
    assert stats.kstest(np.asarray(together).reshape(-1), "norm").pvalue > 1e-4
    for key, row in zip(keys, together, strict=True):
        np.testing.assert_allclose(jax.random.normal(key, (20_000,), jnp.float32), row, atol=1e-6)
    correlation = np.corrcoef(np.asarray(together))
    assert np.max(np.abs(correlation - np.eye(4))) < 5 / np.sqrt(20_000)


def test_a_key_is_new_every_time_and_comes_from_no_seed() -> None:
    assert not np.array_equal(data(secret_key()), data(secret_key()))
    with pytest.raises(ValueError, match="has 32 bytes, got 31"):
        secret_key(bytes(31))
    with pytest.raises(TypeError, match="not from a seed"):
        jax.random.key(3, impl=jax.random.key_impl(secret_key()))
