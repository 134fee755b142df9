"""The table of rings: every set it gives is secure, holds its sums, and fails below 2^-40."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure.parameters import choose as choose_bfv
from fedjax_llm.secure.ring_table import FAILURE_LOG2, TABLE, choose
from fedjax_llm_kernels.ring_parameters import CBD_ETA


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8, 12, 14, 16, 20, 24]),
    summands=st.integers(1, 250),
    count=st.integers(1, 10**8),
)
def test_every_set_keeps_its_promises(bits, summands, count):
    max_abs = 2 ** (bits - 1) - 1
    found = choose(max_abs, summands, count)
    ring = found.ring
    # Secure: inside the standard's table, with the deviation that Hint-RLWE leaves.
    assert math.log2(math.prod(ring.primes)) <= TABLE[ring.size]
    assert math.sqrt(CBD_ETA / 2) / math.sqrt(2) >= 3.19
    assert math.sqrt(CBD_ETA / 2) >= 4.52
    # Correct: digits never carry, the modulus is never reached, errors stay in their place.
    assert 2 * max_abs * summands < 2**ring.digit_bits
    assert math.prod(ring.primes) >= 2 ** (ring.digit_bits * ring.digits + ring.scale_bits)
    assert found.failure_log2(count) <= FAILURE_LOG2
    assert all(prime < 2**27 and prime % (2 * ring.size) == 1 for prime in ring.primes)
    assert max_abs * summands < 2**31


def test_the_failure_bound_is_not_below_the_true_probability():
    """Errors are (ones among 96 n bits) - 48 n: the exact tail, for few clients."""
    for summands, scale_bits in ((1, 5), (2, 6), (8, 7)):
        room, bits = 2 ** (scale_bits - 1), 2 * CBD_ETA * summands
        ways = [math.comb(bits, ones) for ones in range(bits + 1)]
        beyond = sum(w for ones, w in enumerate(ways) if abs(ones - bits // 2) >= room)
        exact = math.log2(beyond) - bits
        claimed = 1 - room * room / (CBD_ETA * summands) / math.log(2)
        assert exact <= claimed < exact + 20


def test_a_sum_of_sixteen_bits_over_eight_clients_is_near_its_payload():
    found = choose(2**15 - 1, 8, 10**6)
    payload = math.log2(2 * 8 * (2**15 - 1) + 1)
    assert payload < found.bits_per_integer < 21
    assert found.bits_per_integer == pytest.approx(8 * 2.6, rel=0.01)


def test_a_larger_ring_is_taken_only_where_it_saves_bytes():
    assert choose(2**15 - 1, 8, 50).ring.size == 2048
    sizes = {choose(2**15 - 1, 8, count).ring.size for count in (10**3, 10**5, 10**7)}
    assert sizes <= set(TABLE)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((0, 8, 10), "at least 1, got 0, 8 and 10"),
        ((100, 0, 10), "at least 1"),
        ((100, 8, 0), "at least 1"),
        ((2**23 - 1, 257, 10), "take 33 bits, at most 32"),
    ],
)
def test_what_no_ring_holds_is_refused(arguments, reason):
    with pytest.raises(UserError, match=reason):
        choose(*arguments)


def test_standard_deviation_of_the_kernel_s_errors():
    """The distribution that the table argues about is the one that is sampled."""
    import jax.numpy as jnp

    from fedjax_llm.secure.streams import SecretWords
    from fedjax_llm_kernels import ring as kernel

    ring = choose(2**15 - 1, 8, 10**6).ring
    words = SecretWords()
    samples = np.concatenate(
        [
            np.asarray(kernel.prepare_secret(ring, jnp.asarray(words.draw(3, ring.size)))[0])
            for _ in range(25)
        ]
    ).astype(float)
    # 102,400 samples: mean within 6 sigma / 320, variance within 6 sqrt(2) 24 / 320.
    assert abs(samples.mean()) < 0.1
    assert abs(samples.var() - 24) < 0.65
    assert np.abs(samples).max() <= CBD_ETA


@pytest.mark.parametrize(("summands", "clouds"), [(2, 2), (1000, 3), (100_000, 3), (97_000, 64)])
def test_secrets_of_the_largest_ring_fit_one_ciphertext(summands, clouds):
    found = choose_bfv(CBD_ETA, summands, clouds, max(TABLE), one_ciphertext=True)
    assert found.ciphertexts(max(TABLE)) == 1


def test_more_clients_than_one_ciphertext_holds_are_refused():
    with pytest.raises(UserError, match="to fit 8192 of them into one ciphertext"):
        choose_bfv(CBD_ETA, 2**20, 3, max(TABLE), one_ciphertext=True)
