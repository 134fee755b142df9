"""ChaCha20 against RFC 8439 and OpenSSL, and the public polynomial expanded from it."""

import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm_kernels.chacha import keystream
from fedjax_llm_kernels.ring import Ring, choose_primes, uniform, uniform_host

KEY = bytes(range(32))


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u4")


def openssl(key: bytes):
    def stream(nonce_words: tuple[int, int, int], first_block: int, blocks: int) -> bytes:
        nonce = np.array([first_block, *nonce_words], "<u4").tobytes()
        return Cipher(algorithms.ChaCha20(key, nonce), None).encryptor().update(bytes(64 * blocks))

    return stream


def small_ring(primes: tuple[int, ...]) -> Ring:
    return Ring(1024, primes, digit_bits=4, digits=1, scale_bits=8, offset=8)


def test_the_block_of_rfc_8439_section_2_3_2():
    nonce = words(bytes.fromhex("000000090000004a00000000"))
    block = np.asarray(keystream(jnp.asarray(words(KEY)), nonce.tolist(), jnp.uint32([1])))
    assert block.astype("<u4").tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@settings(max_examples=20, deadline=None)
@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    st.integers(0, 2**32 - 8),
)
def test_the_keystream_is_openssl_s(key, nonce, first):
    counters = jnp.asarray(np.arange(first, first + 7).astype(np.uint32))
    ours = np.asarray(keystream(jnp.asarray(words(key)), nonce, counters))
    np.testing.assert_array_equal(ours.reshape(-1), words(openssl(key)(tuple(nonce), first, 7)))


def by_definition(ring: Ring, key: bytes, element: int) -> list[list[int]]:
    """The docstring of `ring_uniform` in plain Python."""
    stream, limbs = openssl(key), []
    for limb, prime in enumerate(ring.primes):
        blocks = ring.size // 16
        first = words(stream((limb, 0, 0), element * blocks, blocks)).tolist()
        row, rejected = [], 0
        for word in first:
            x = word % 2 ** prime.bit_length()
            if x >= prime:
                block = 8 * element + rejected // 8 % 8
                draws = words(stream((limb, 1 + rejected // 64, 0), block, 1)).tolist()
                low, high = draws[rejected % 8 * 2 : rejected % 8 * 2 + 2]
                x = (low + (high << 32)) % prime
                rejected += 1
            row.append(x)
        limbs.append(row)
    return limbs


# A quarter of 14 bits is not below 12289: many groups of eight are drawn again.
@pytest.mark.parametrize("primes", [(12289, 40961), choose_primes(1024, [27, 26, 26])])
@pytest.mark.parametrize("first", [0, 5, 2**26 - 16])
def test_device_host_and_definition_give_the_same_polynomials(primes, first):
    ring = small_ring(primes)
    elements = 3
    host = uniform_host(ring, openssl(KEY), first, elements)
    device = uniform(ring, jnp.asarray(words(KEY)), first, elements)
    assert host.dtype == np.uint32 and host.shape == (elements, len(primes), 1024)
    np.testing.assert_array_equal(device, host)
    np.testing.assert_array_equal(host[1], by_definition(ring, KEY, first + 1))
    assert (host < np.array(primes, np.uint32)[:, None]).all()


def test_an_element_does_not_depend_on_what_is_expanded_with_it():
    ring = small_ring((12289,))
    many = uniform_host(ring, openssl(KEY), 3, 9)
    np.testing.assert_array_equal(many[4:6], uniform_host(ring, openssl(KEY), 7, 2))


def test_residues_are_uniform():
    ring = small_ring((12289,))
    counts = np.bincount(uniform_host(ring, openssl(KEY), 0, 600).reshape(-1), minlength=12289)
    expected = 600 * 1024 / 12289
    chi_squared = float(((counts - expected) ** 2).sum() / expected)
    # 12288 degrees of freedom: standard deviation 157.
    assert abs(chi_squared - 12288) < 6 * 157


def test_no_elements_and_elements_beyond_the_stream():
    ring = small_ring((12289,))
    assert uniform_host(ring, openssl(KEY), 4, 0).shape == (0, 1, 1024)
    for first, elements in [(-1, 1), (2**26, 1), (0, -1), (2**26 - 1, 2)]:
        with pytest.raises(ValueError, match="use another key"):
            uniform_host(ring, openssl(KEY), first, elements)
        with pytest.raises(ValueError, match="use another key"):
            uniform(ring, jnp.asarray(words(KEY)), first, elements)


def test_a_short_keystream_is_refused():
    with pytest.raises(ValueError, match="the keystream gave 3"):
        uniform_host(small_ring((12289,)), lambda *_: b"abc", 0, 1)
