"""Ring elements as their residues: in and out of OpenFHE's bytes, packed, and added.

In OpenFHE's BINARY serialisation a ring element modulo ``Q = q_1 ... q_L`` is, limb after limb,
the length N, N little-endian uint64 residues and the modulus. Everything around them
is the same for all ciphertexts of a context. So only residues travel, each in exactly as many
bits as its modulus has; on arrival they are checked to be below it and written into a template
that the receiver made itself. OpenFHE's deserialiser, which was not written for hostile input,
never sees a byte of the structure that came from somebody else.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError
from fedjax_llm.secure.sums import BadMessage

_UNKNOWN_FORMAT = (
    "this OpenFHE writes ring elements in an unknown format: install the version that "
    "constraints.txt names"
)

Residues = NDArray[np.uint64]  # [E, L, N]: ring elements, limbs, coefficients


@dataclass(frozen=True)
class Template:
    """An OpenFHE object's bytes with the places of its residues.

    Attributes:
        data: the serialisation of some object of this shape.
        offsets: byte offset of each limb's residues, elements first, then limbs.
        size: N, residues per limb.
    """

    data: bytes
    offsets: tuple[int, ...]
    size: int

    @staticmethod
    def moduli_in(data: bytes, limbs: int, size: int) -> tuple[int, ...]:
        """The moduli of the first ring element that stands in an OpenFHE object's bytes."""
        mark = struct.pack("<Q", size)
        moduli: list[int] = []
        at = 0
        while len(moduli) < limbs:
            at = data.find(mark, at)
            end = at + 8 + 8 * size
            if at < 0 or end + 8 > len(data):
                raise UserError(_UNKNOWN_FORMAT)
            (modulus,) = struct.unpack_from("<Q", data, end)
            residues = np.frombuffer(data, "<u8", size, at + 8)
            if modulus < 2**60 and modulus % (2 * size) == 1 and (residues < modulus).all():
                moduli.append(modulus)
                at = end
            else:
                at += 1
        return tuple(moduli)

    @classmethod
    def of(cls, data: bytes, elements: int, moduli: Sequence[int], size: int) -> "Template":
        """Finds the residues; fails if the format is not the one described above."""
        return cls(data, tuple(_offsets(data, elements, moduli, size)), size)

    def write(self, residues_ELN: Residues) -> bytes:
        """The bytes of an object of this shape with the given residues."""
        image = bytearray(self.data)
        rows = residues_ELN.reshape(-1, self.size)
        for offset, row in zip(self.offsets, rows, strict=True):
            image[offset : offset + 8 * self.size] = row.astype("<u8").tobytes()
        return bytes(image)


def _offsets(data: bytes, elements: int, moduli: Sequence[int], size: int) -> list[int]:
    mark = struct.pack("<Q", size)
    offsets = []
    at = 0
    for _ in range(elements):
        for modulus in moduli:
            tail = struct.pack("<Q", modulus)
            at = data.find(mark, at)
            while at >= 0 and data[at + 8 + 8 * size : at + 16 + 8 * size] != tail:
                at = data.find(mark, at + 1)
            if at < 0:
                raise UserError(_UNKNOWN_FORMAT)
            offsets.append(at + 8)
            at += 8 + 8 * size
    return offsets


def read(data: bytes, elements: int, moduli: Sequence[int], size: int) -> Residues:
    """The residues [elements, L, N] of an object that OpenFHE has serialised in this process.

    What stands between them may differ from a template's: OpenFHE repeats tables that two
    elements do not share in memory.
    """
    offsets = _offsets(data, elements, moduli, size)
    rows = [np.frombuffer(data, "<u8", size, offset) for offset in offsets]
    return np.stack(rows).reshape(elements, len(moduli), size).astype(np.uint64)


def packed_bytes(moduli: Sequence[int], size: int) -> int:
    """Bytes of one ring element on the wire; ``size`` is a multiple of 8."""
    return sum(modulus.bit_length() for modulus in moduli) * size // 8


def pack(residues_ELN: Residues, moduli: Sequence[int]) -> bytes:
    """Residues in as many bits as their moduli have: whole bytes first, then the odd bits."""
    parts = []
    for element in residues_ELN:
        for row, modulus in zip(element, moduli, strict=True):
            whole, odd = divmod(modulus.bit_length(), 8)
            octets = row.astype("<u8").view(np.uint8).reshape(-1, 8)
            parts.append(octets[:, :whole].tobytes())
            if odd:
                bits = np.unpackbits(octets[:, whole, None], axis=1)[:, 8 - odd :]
                parts.append(np.packbits(bits.reshape(-1)).tobytes())
    return b"".join(parts)


def unpack(data: bytes, elements: int, moduli: Sequence[int], size: int, sender: str) -> Residues:
    """The inverse of ``pack``.

    Raises:
        BadMessage: naming ``sender``: a wrong length, or a residue that is not below its modulus.
    """
    if len(data) != elements * packed_bytes(moduli, size):
        raise BadMessage(sender, f"{len(data)} bytes of residues where others belong")
    out = np.empty((elements, len(moduli), size), np.uint64)
    at = 0
    for element in out:
        for row, modulus in zip(element, moduli, strict=True):
            whole, odd = divmod(modulus.bit_length(), 8)
            octets = np.zeros((size, 8), np.uint8)
            low = np.frombuffer(data, np.uint8, whole * size, at)
            octets[:, :whole] = low.reshape(size, whole)
            at += whole * size
            if odd:
                bits = np.unpackbits(np.frombuffer(data, np.uint8, odd * size // 8, at))
                padded = np.zeros((size, 8), np.uint8)
                padded[:, 8 - odd :] = bits.reshape(size, odd)
                octets[:, whole] = np.packbits(padded, axis=1)[:, 0]
                at += odd * size // 8
            row[:] = octets.view("<u8")[:, 0]
            if (row >= np.uint64(modulus)).any():
                raise BadMessage(sender, "a residue is not below its modulus")
    return out


def add(left_ELN: Residues, right_ELN: Residues, moduli: Sequence[int]) -> Residues:
    """The sum modulo each limb's prime: what OpenFHE's EvalAdd computes.

    Residues are below 2**60, so the sum fits; where it is below the modulus, subtracting wraps
    around to something larger, and the minimum is the reduced one in either case.
    """
    total = left_ELN + right_ELN
    return np.minimum(total, total - np.asarray(moduli, np.uint64)[None, :, None])
