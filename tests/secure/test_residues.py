"""Packing is exact and refuses what is not residues; slots are a balanced number system."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure.parameters import HE_STANDARD_128, MAX_PLAINTEXT_BITS, choose
from fedjax_llm.secure.residues import Template, add, add_to, pack, packed_bytes, read, unpack
from fedjax_llm.secure.shamir import uniform_residues
from fedjax_llm.secure.slots import pack_slots, unpack_slots
from fedjax_llm.secure.sums import BadMessage
from fedjax_llm_kernels.ring_parameters import is_prime

MODULI = (1099511480321, 1152921504606830593, (1 << 41) - 21, 251)


def residues(elements, moduli=MODULI, size=16):
    return np.stack(
        [np.stack([uniform_residues(size, q) for q in moduli]) for _ in range(elements)]
    )


def documented(row, bits):
    """The layout of one limb, from its description, in Python's integers."""
    data, taken = b"", 0
    for width in (32, 16, 8):
        if bits - taken >= width:
            for r in row:
                data += (int(r) >> taken & (1 << width) - 1).to_bytes(width // 8, "little")
            taken += width
    odd = bits - taken
    for at in range(0, len(row), 8) if odd else ():
        word = sum((int(r) >> taken) << odd * i for i, r in enumerate(row[at : at + 8]))
        data += word.to_bytes(odd, "little")
    return data


@pytest.mark.parametrize("bits", range(1, 64))
def test_a_limb_is_packed_as_documented_whatever_its_width(bits):
    modulus = (1 << bits) - 1 if bits > 1 else 1
    row = uniform_residues(24, modulus)
    row[:2] = 0, modulus - 1
    data = pack(row[None, None], (modulus,))
    assert data == documented(row, modulus.bit_length())
    assert np.array_equal(unpack(data, 1, (modulus,), 24, "a")[0, 0], row)


def test_pack_round_trips_in_the_moduli_s_bits():
    values = residues(3)
    values[0, :, 0] = [q - 1 for q in MODULI]
    data = pack(values, MODULI)
    assert len(data) == 3 * packed_bytes(MODULI, 16) == 3 * (40 + 60 + 41 + 8) * 2
    for view in (data, memoryview(bytearray(b"x" + data))[1:]):
        assert np.array_equal(unpack(view, 3, MODULI, 16, "a"), values)


def test_unpack_refuses_wrong_length_and_residues_that_are_not_reduced():
    data = pack(residues(1), MODULI)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(BadMessage, match="'eve'"):
            unpack(wrong, 1, MODULI, 16, "eve")
    with pytest.raises(BadMessage, match="below its modulus"):
        unpack(b"\xff" * len(data), 1, MODULI, 16, "eve")
    for limb, modulus in enumerate(MODULI):
        values = residues(1)
        values[0, limb, 5] = modulus
        with pytest.raises(BadMessage, match="below its modulus"):
            unpack(pack(values, MODULI), 1, MODULI, 16, "eve")


def test_add_is_addition_modulo_each_prime():
    left, right = residues(2), residues(2)
    left[:, :, 0], right[:, :, 0] = [q - 1 for q in MODULI], [q - 1 for q in MODULI]
    left[:, :, 1], right[:, :, 1] = [q - 1 for q in MODULI], 1
    expected = (left.astype(object) + right) % np.array(MODULI, object)[None, :, None]
    assert np.array_equal(add(left, right, MODULI), expected.astype(np.uint64))
    add_to(left, right, MODULI)
    assert np.array_equal(left, expected.astype(np.uint64))


def test_a_template_takes_and_gives_residues_and_refuses_unknown_bytes():
    moduli, size = (97, 193), 16
    values = np.stack([uniform_residues(size, q) for q in moduli])[None]

    def serialised(rows):
        limbs = [
            size.to_bytes(8, "little") + row.astype("<u8").tobytes() + q.to_bytes(8, "little")
            for row, q in zip(rows, moduli, strict=True)
        ]
        return b"head" + b"between".join(limbs) + b"tail"

    template = Template.of(serialised(np.zeros_like(values[0])), 1, moduli, size)
    data = template.write(values)
    assert data == serialised(values[0])
    assert np.array_equal(read(data, 1, moduli, size), values)
    assert Template.moduli_in(data, 2, size) == moduli
    for call in (
        lambda: read(data, 2, moduli, size),
        lambda: read(data, 1, (97, 389), size),
        lambda: Template.moduli_in(data[:200], 2, size),
    ):
        with pytest.raises(UserError, match="unknown format"):
            call()


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
    found = unpack_slots(slots, radix, digits)
    assert np.array_equal(found[:size], sum(vectors)) and not found[size:].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 24),
    st.integers(2, 1000),
    st.integers(2, 9),
    st.one_of(st.none(), st.integers(1, 200_000)),
)
def test_chosen_parameters_are_correct_and_inside_the_standard_s_table(
    bits, summands, parties, count
):
    try:
        p = choose(2 ** (bits - 1) - 1, summands, parties, count)
    except UserError:
        assert bits + np.log2(summands) > 40
        return
    assert p.log_q <= HE_STANDARD_128[p.ring_dimension]
    assert is_prime(p.plaintext_modulus) and p.plaintext_modulus % (2 * p.ring_dimension) == 1
    assert p.radix**p.digits <= p.plaintext_modulus < 2**MAX_PLAINTEXT_BITS
    assert p.radix > 2 * summands * p.max_abs
    assert 0.99 * 2**p.limb_bits > 1.25 * parties * p.plaintext_modulus
    assert p.summands <= (p.plaintext_modulus - 1) // 2
    if count is not None:
        # No other choice for the same sums has a smaller upload.
        assert p.per_ciphertext * (p.ciphertexts(count) - 1) < count
        many = choose(2 ** (bits - 1) - 1, summands, parties)
        assert p.ciphertext_bytes * p.ciphertexts(count) <= (
            many.ciphertext_bytes * many.ciphertexts(count)
        )


def test_a_few_small_integers_take_one_small_ciphertext():
    for summands, parties, count in ((8, 3, 2048), (8, 3, 4096), (64, 5, 4096), (64, 3, 8192)):
        chosen = choose(48, summands, parties, count)
        assert chosen.ring_dimension == 8192 and chosen.ciphertexts(count) == 1
        assert chosen.ciphertext_bytes <= 355_000
        assert chosen.digits == (1 if count < 8192 else 2)


def test_sums_that_fit_no_slot_are_refused():
    with pytest.raises(UserError, match="47 bits"):
        choose(2**30, 2**20, 3)
    for summands, parties in ((2**20 + 1, 3), (8, 65)):
        with pytest.raises(UserError, match="takes up to"):
            choose(1, summands, parties)
    for numbers in ((0, 1, 2), (1, 0, 2), (1, 1, 1)):
        with pytest.raises(UserError, match="of at least 1"):
            choose(*numbers)
    with pytest.raises(UserError, match="at least 1 integer"):
        choose(1, 1, 2, 0)


def test_primes():
    assert [n for n in range(60) if is_prime(n)] == [
        n for n in range(2, 60) if all(n % d for d in range(2, n))
    ]
    assert not is_prime(3215031751) and is_prime(2**61 - 1)
