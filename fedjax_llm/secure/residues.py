"""Ring elements as their residues: in and out of OpenFHE's bytes, packed, and added.

In OpenFHE's BINARY serialisation a ring element modulo ``Q = q_1 ... q_L`` is, limb after limb,
the length N, N little-endian uint64 residues and the modulus. Everything around them
is the same for all ciphertexts of a context. So only residues travel, each in exactly as many
bits as its modulus has; on arrival they are checked to be below it and written into a template
that the receiver made itself. OpenFHE's deserialiser, which was not written for hostile input,
never sees a byte of the structure that came from somebody else.

**Packed.** The limbs of an element follow one another, and elements one another. A limb modulo a
prime of b <= 63 bits is up to four planes over its N residues r, lowest bits first; all integers
are little-endian. With o the bits of r that the planes before have taken:

| plane, there if b - o >= | holds | bytes |
|---|---|---|
| 32 | the low 32 bits of r, as uint32 | 4 N |
| 16 | the next 16 bits, r >> o, as uint16 | 2 N |
| 8 | the next 8 bits, r >> o, as uint8 | N |
| 1 | the last d = b - o < 8 bits: eight residues make d bytes, the first lowest | N d / 8 |

Whole words are what makes this fast: a limb is a few passes of numpy over N words, not N d bits.
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
_PLANES = ((32, np.dtype("<u4")), (16, np.dtype("<u2")), (8, np.dtype("u1")))

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
            np.frombuffer(image, "<u8", self.size, offset)[:] = row
        return bytes(image)


def _offsets(data: bytes, elements: int, moduli: Sequence[int], size: int) -> list[int]:
    # Residues are stepped over, so that only the few hundred bytes between limbs are searched.
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
    residues = np.empty((elements * len(moduli), size), np.uint64)
    offsets = _offsets(data, elements, moduli, size)
    for row, offset in zip(residues, offsets, strict=True):
        row[:] = np.frombuffer(data, "<u8", size, offset)
    return residues.reshape(elements, len(moduli), size)


def packed_bytes(moduli: Sequence[int], size: int) -> int:
    """Bytes of one ring element on the wire; ``size`` is a multiple of 8."""
    return sum(modulus.bit_length() for modulus in moduli) * size // 8


def pack(residues_ELN: Residues, moduli: Sequence[int]) -> bytes:
    """Residues in as many bits as their moduli have; see the layout above."""
    size = residues_ELN.shape[-1]
    out = np.empty(residues_ELN.shape[0] * packed_bytes(moduli, size), np.uint8)
    at = 0
    for element in residues_ELN:
        for row, modulus in zip(element, moduli, strict=True):
            at = _pack_limb(out, at, row, modulus.bit_length())
    return out.tobytes()


def _pack_limb(out: NDArray[np.uint8], at: int, row: NDArray[np.uint64], bits: int) -> int:
    taken = 0
    for width, dtype in _PLANES:
        if bits - taken >= width:
            plane = out[at : at + row.size * dtype.itemsize].view(dtype)
            # Storing in a narrower type keeps the low bits, which are the ones that are wanted.
            plane[:] = row if taken == 0 else row >> np.uint64(taken)
            at, taken = at + plane.nbytes, taken + width
    odd = bits - taken
    if odd:
        groups = (row >> np.uint64(taken)).astype(np.uint8).view("<u8")
        octets = _squeeze(groups, odd).view(np.uint8).reshape(-1, 8)
        out[at : at + row.size * odd // 8].reshape(-1, odd)[:] = octets[:, :odd]
        at += row.size * odd // 8
    return at


def unpack(
    data: bytes | memoryview, elements: int, moduli: Sequence[int], size: int, sender: str
) -> Residues:
    """The inverse of ``pack``.

    Raises:
        BadMessage: naming ``sender``: a wrong length, or a residue that is not below its modulus.
    """
    if len(data) != elements * packed_bytes(moduli, size):
        raise BadMessage(sender, f"{len(data)} bytes of residues where others belong")
    packed = np.frombuffer(data, np.uint8)
    out = np.empty((elements, len(moduli), size), np.uint64)
    at = 0
    for element in out:
        for row, modulus in zip(element, moduli, strict=True):
            at = _unpack_limb(packed, at, row, modulus.bit_length())
            if int(row.max()) >= modulus:
                raise BadMessage(sender, "a residue is not below its modulus")
    return out


def _unpack_limb(packed: NDArray[np.uint8], at: int, row: NDArray[np.uint64], bits: int) -> int:
    taken = 0
    for width, dtype in _PLANES:
        if bits - taken >= width:
            plane = packed[at : at + row.size * dtype.itemsize].view(dtype)
            if taken == 0:
                row[:] = plane
            else:
                row |= plane.astype(np.uint64) << np.uint64(taken)
            at, taken = at + plane.nbytes, taken + width
    odd = bits - taken
    if odd:
        octets = np.zeros((row.size // 8, 8), np.uint8)
        octets[:, :odd] = packed[at : at + row.size * odd // 8].reshape(-1, odd)
        rest = _spread(octets.view("<u8")[:, 0], odd).view(np.uint8).astype(np.uint64)
        if taken == 0:
            row[:] = rest
        else:
            row |= rest << np.uint64(taken)
        at += row.size * odd // 8
    return at


def _squeeze(groups: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Eight values of ``bits`` bits, one per byte of a word, moved together to its low end."""
    for step in (1, 2, 4):  # pairs of values, then pairs of pairs, then the two halves
        low, gap = _low_fields(step, bits), np.uint64(step * (8 - bits))
        groups = (groups & low) | ((groups >> gap) & (low << np.uint64(step * bits)))
    return groups


def _spread(groups: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """The inverse of ``_squeeze``."""
    for step in (4, 2, 1):
        low, gap = _low_fields(step, bits), np.uint64(step * (8 - bits))
        groups = (groups & low) | ((groups & (low << np.uint64(step * bits))) << gap)
    return groups


def _low_fields(step: int, bits: int) -> np.uint64:
    """Of every ``2 * step`` bytes, the lowest ``step * bits`` bits: the first half's values."""
    field = (1 << step * bits) - 1
    return np.uint64(sum(field << at for at in range(0, 64, 16 * step)))


def add(left_ELN: Residues, right_ELN: Residues, moduli: Sequence[int]) -> Residues:
    """The sum modulo each limb's prime: what OpenFHE's EvalAdd computes.

    Residues are below 2**60, so the sum fits; where it is below the modulus, subtracting wraps
    around to something larger, and the minimum is the reduced one in either case.
    """
    total = left_ELN + right_ELN
    return np.minimum(total, total - np.asarray(moduli, np.uint64)[None, :, None])


def add_to(total_ELN: Residues, right_ELN: Residues, moduli: Sequence[int]) -> None:
    """``add`` in place; a limb at a time, which then stays in the processor's cache."""
    for total, right in zip(total_ELN, right_ELN, strict=True):
        for row, other, modulus in zip(total, right, moduli, strict=True):
            row += other
            np.minimum(row, row - np.uint64(modulus), out=row)
