"""Integers of few bits as bytes, for what travels in the plain.

A number n of b bits travels as n + m, m = 2^(b-1) - 1, in b bits, the highest first, one after the
other; zeros fill the last byte. So there is one sequence of bytes for every vector. Numpy, at the
edge: it is called on what has left the devices. Encrypted sums have a packing of their own.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.compression.rounding import check_bits, largest_integer
from fedjax_llm.errors import UserError

# Eight numbers of b bits are b bytes.
_GROUP = 8


def payload_bytes(count: int, bits: int) -> int:
    """The bytes of so many numbers.

    >>> payload_bytes(3, 4), payload_bytes(1000, 8), payload_bytes(0, 5)
    (2, 1000, 0)
    """
    check_bits(bits)
    return -(-count * bits // 8)


def pack(ints_M: NDArray[np.int32], bits: int) -> bytes:
    """The bytes of a vector of integers; `payload_bytes(M, bits)` of them.

    Raises:
        UserError: a number does not fit, as that of a message that was not finite.
    """
    largest = largest_integer(bits)
    ints_M = np.asarray(ints_M, np.int64)
    (wrong,) = np.nonzero(np.abs(ints_M) > largest)
    if wrong.size:
        raise UserError(
            f"entry {wrong[0]} is {ints_M[wrong[0]]} and {bits} bits hold -{largest} to {largest}; "
            "the message was not finite or is not of these bits"
        )
    groups = -(-ints_M.size // _GROUP)
    fields = np.zeros(groups * _GROUP, np.uint32)
    fields[: ints_M.size] = ints_M + largest
    payload = np.zeros((groups, bits), np.uint8)
    for place, byte, shift in _pieces(bits):
        field = fields[place::_GROUP]
        piece = field << np.uint32(shift) if shift >= 0 else field >> np.uint32(-shift)
        payload[:, byte] |= piece.astype(np.uint8)  # keeps the lowest eight bits
    return payload.tobytes()[: payload_bytes(ints_M.size, bits)]


def unpack(payload: bytes, count: int, bits: int) -> NDArray[np.int32]:
    """The inverse of `pack`.

    Raises:
        UserError: bytes that `pack` does not write.
    """
    largest, expected = largest_integer(bits), payload_bytes(count, bits)
    if len(payload) != expected:
        raise UserError(
            f"{count} numbers of {bits} bits are {expected} bytes, got {len(payload)}; the sender "
            "uses another codec"
        )
    groups = -(-count // _GROUP)
    whole = payload.ljust(groups * bits, b"\0")
    found = np.frombuffer(whole, np.uint8).reshape(groups, bits)
    fields = np.zeros(groups * _GROUP, np.uint32)
    for place, byte, shift in _pieces(bits):
        piece = found[:, byte].astype(np.uint32)
        fields[place::_GROUP] |= (
            piece >> np.uint32(shift) if shift >= 0 else piece << np.uint32(-shift)
        )
    fields &= np.uint32(2**bits - 1)
    if (fields[count:] != 0).any() or (fields[:count] > 2 * largest).any():
        raise UserError(
            f"{expected} bytes are not {count} numbers of {bits} bits; they were damaged"
        )
    return fields[:count].astype(np.int32) - np.int32(largest)


def _pieces(bits: int) -> Iterator[tuple[int, int, int]]:
    """Which of eight numbers reaches into which byte, and by what left shift."""
    for place in range(_GROUP):
        start, end = place * bits, (place + 1) * bits
        for byte in range(start // 8, (end - 1) // 8 + 1):
            yield place, byte, 8 * (byte + 1) - end
