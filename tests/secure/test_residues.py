"""Packing is exact and refuses what is not residues; slots are a balanced number system."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure.parameters import HE_STANDARD_128, MAX_PLAINTEXT_BITS, choose, is_prime
from fedjax_llm.secure.residues import add, pack, packed_bytes, unpack
from fedjax_llm.secure.shamir import uniform_residues
from fedjax_llm.secure.slots import pack_slots, unpack_slots
from fedjax_llm.secure.sums import BadMessage
from fedjax_llm.secure.wire import frame, message, open_message, unframe

MODULI = (1099511480321, 1152921504606830593, (1 << 41) - 21, 251)


def residues(elements, moduli=MODULI, size=16):
    return np.stack(
        [np.stack([uniform_residues(size, q) for q in moduli]) for _ in range(elements)]
    )


def test_pack_round_trips_in_the_moduli_s_bits():
    values = residues(3)
    values[0, :, 0] = [q - 1 for q in MODULI]
    data = pack(values, MODULI)
    assert len(data) == 3 * packed_bytes(MODULI, 16) == 3 * (40 + 60 + 41 + 8) * 2
    assert np.array_equal(unpack(data, 3, MODULI, 16, "a"), values)


def test_unpack_refuses_wrong_length_and_residues_that_are_not_reduced():
    data = pack(residues(1), MODULI)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(BadMessage, match="'eve'"):
            unpack(wrong, 1, MODULI, 16, "eve")
    with pytest.raises(BadMessage, match="below its modulus"):
        unpack(b"\xff" * len(data), 1, MODULI, 16, "eve")


def test_add_is_addition_modulo_each_prime():
    left, right = residues(2), residues(2)
    expected = (left.astype(object) + right) % np.array(MODULI, object)[None, :, None]
    assert np.array_equal(add(left, right, MODULI), expected.astype(np.uint64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 4), st.integers(2, 9), st.data())
def test_slots_of_sums_are_sums_of_slots(bound, digits, summands, data):
    radix = 2 * bound * summands + 1
    if radix**digits >= 2**62:
        return
    entry = st.one_of(st.sampled_from([-bound, bound]), st.integers(-bound, bound))
    size = data.draw(st.integers(1, 7))
    vectors = [
        np.array(data.draw(st.lists(entry, min_size=size, max_size=size)), np.int64)
        for _ in range(summands)
    ]
    slots = sum(pack_slots(vector, radix, digits) for vector in vectors)
    assert np.abs(slots).max() <= (radix**digits - 1) // 2
    assert np.array_equal(unpack_slots(slots, radix, digits, size), sum(vectors))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(2, 1000), st.integers(2, 9))
def test_chosen_parameters_are_correct_and_inside_the_standard_s_table(bits, summands, parties):
    try:
        p = choose(2 ** (bits - 1) - 1, summands, parties)
    except UserError:
        assert bits + np.log2(summands) > 40
        return
    assert p.log_q <= HE_STANDARD_128[p.ring_dimension]
    assert is_prime(p.plaintext_modulus) and p.plaintext_modulus % (2 * p.ring_dimension) == 1
    assert p.radix**p.digits <= p.plaintext_modulus < 2**MAX_PLAINTEXT_BITS
    assert p.radix > 2 * summands * p.max_abs
    assert 0.99 * 2**p.limb_bits > 1.25 * parties * p.plaintext_modulus
    assert p.summands <= (p.plaintext_modulus - 1) // 2


def test_sums_that_fit_no_slot_are_refused():
    with pytest.raises(UserError, match="50 bits"):
        choose(2**30, 2**20, 3)
    for summands, parties in ((2**20 + 1, 3), (8, 65)):
        with pytest.raises(UserError, match="takes up to"):
            choose(1, summands, parties)
    for numbers in ((0, 1, 2), (1, 0, 2), (1, 1, 1)):
        with pytest.raises(UserError, match="of at least 1"):
            choose(*numbers)


def test_primes():
    assert [n for n in range(60) if is_prime(n)] == [
        n for n in range(2, 60) if all(n % d for d in range(2, n))
    ]
    assert not is_prime(3215031751) and is_prime(2**61 - 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_any_change_to_a_message_is_a_bad_message(body, data):
    whole = message("test", "alice", 3, b"epoch", 5, body)
    assert open_message("test", "alice", 3, b"epoch", 5, whole) == body
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for wrong in (bytes(damaged), cut, whole + b"\0", data.draw(st.binary(max_size=300))):
        with pytest.raises(BadMessage, match="'alice'"):
            open_message("test", "alice", 3, b"epoch", 5, wrong)


def test_headers_that_differ_are_refused_by_what_differs():
    whole = message("test", "alice", 3, b"epoch", 5, b"body")
    for arguments, reason in [
        (("other", "alice", 3, b"epoch", 5), "message where"),
        (("test", "bob", 3, b"epoch", 5), "written by 'alice'"),
        (("test", "alice", 4, b"epoch", 5), "belongs to round 3"),
        (("test", "alice", 3, b"other", 5), "other keys"),
        (("test", "alice", 3, b"epoch", 6), "holds 5 integers"),
    ]:
        with pytest.raises(BadMessage, match=reason):
            open_message(*arguments, whole)
    with pytest.raises(BadMessage, match="fields"):
        unframe("test", 2, frame("test", b"one"), "alice")
