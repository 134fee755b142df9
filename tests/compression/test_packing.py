"""Bytes of few-bit integers against strings of binary digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.compression import largest_integer, pack, payload_bytes, unpack
from fedjax_llm.compression.rounding import INVALID
from fedjax_llm.errors import UserError


@given(st.integers(2, 16), st.data())
def test_numbers_become_their_digits_one_after_the_other(bits, data):
    largest = largest_integer(bits)
    ints = data.draw(st.lists(st.integers(-largest, largest), max_size=40))
    digits = "".join(f"{number + largest:0{bits}b}" for number in ints)
    digits += "0" * (-len(digits) % 8)
    expected = bytes(int(digits[k : k + 8], 2) for k in range(0, len(digits), 8))
    payload = pack(np.array(ints, np.int32), bits)
    assert payload == expected
    assert len(payload) == payload_bytes(len(ints), bits)
    found = unpack(payload, len(ints), bits)
    assert found.dtype == np.int32 and found.tolist() == ints


@pytest.mark.parametrize("wrong", [8, -8, INVALID, 2**31 - 1])
def test_what_does_not_fit_is_named(wrong):
    with pytest.raises(UserError, match=f"entry 2 is {wrong} and 4 bits hold -7 to 7"):
        pack(np.array([0, 7, wrong], np.int32), 4)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x00", "3 numbers of 4 bits are 2 bytes, got 1; the sender uses another codec"),
        (b"\x00\x00\x00", "got 3"),
        (b"\xf0\x00", "2 bytes are not 3 numbers of 4 bits; they were damaged"),  # 15 is 8
        (b"\x00\x01", "they were damaged"),  # in what fills the last byte
    ],
)
def test_other_bytes_are_refused(payload, message):
    with pytest.raises(UserError, match=message):
        unpack(payload, 3, 4)


@given(st.integers(2, 16), st.integers(0, 40), st.binary(max_size=80))
def test_whatever_is_unpacked_packs_to_the_same_bytes(bits, count, noise):
    payload = noise[: payload_bytes(count, bits)].ljust(payload_bytes(count, bits), b"\0")
    try:
        found = unpack(payload, count, bits)
    except UserError:
        return
    assert pack(found, bits) == payload
