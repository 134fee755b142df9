"""Messages that two clouds exchange to find their common duplicates, as bytes.

    initiator                                   responder
        | ---- Elements: own, disguised once -------> |
        | <--- Elements: the same, disguised twice -- |
        | <--- Elements: own, disguised once -------- |
        | ---- Elements: the same, disguised twice -> |
        | ---- Groups: places, by row --------------> |
        | <--- Groups: places, by row --------------- |

A message is read strictly: lengths must fit to the byte and places must be in range, so that a
damaged one is an error and not a wrong match. All integers are unsigned, 32 bits, big-endian.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.data.harmonise.blinding import ELEMENT_BYTES
from fedjax_llm.errors import UserError

_COUNT_BYTES = 4


@dataclass(frozen=True)
class Elements:
    """Disguised values, 32 bytes each, in an order that its sender chose at random.

    Attributes:
      elements: The values.
    """

    elements: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The count, then the elements."""
        return len(self.elements).to_bytes(_COUNT_BYTES, "big") + b"".join(self.elements)

    @classmethod
    def from_bytes(cls, data: bytes, expected: int | None = None) -> "Elements":
        """Reads a message.

        Args:
          data: The bytes.
          expected: How many elements there must be, where that is known.

        Raises:
          UserError: Another length or another number of elements.
        """
        count = int.from_bytes(data[:_COUNT_BYTES], "big")
        if len(data) != _COUNT_BYTES + ELEMENT_BYTES * count or len(data) < _COUNT_BYTES:
            raise _damaged(f"{len(data)} bytes for {count} elements")
        if expected is not None and count != expected:
            raise _damaged(f"{count} elements in place of {expected}")
        body = data[_COUNT_BYTES:]
        return cls(
            tuple(
                body[start : start + ELEMENT_BYTES] for start in range(0, len(body), ELEMENT_BYTES)
            )
        )


@dataclass(frozen=True)
class Groups:
    """Which of the receiver's elements each of the sender's rows has; rows in random order.

    Attributes:
      places: For each row, ascending places in the receiver's `Elements`.
    """

    places: tuple[tuple[int, ...], ...]

    def to_bytes(self) -> bytes:
        """The number of rows; then for each the number of places and the places."""
        flat = [len(self.places)]
        for row in self.places:
            flat += [len(row), *row]
        return np.array(flat, ">u4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, elements: int) -> "Groups":
        """Reads a message.

        Args:
          data: The bytes.
          elements: How many elements the receiver sent.

        Raises:
          UserError: Lengths that do not fit, an empty row, or a place out of range or order.
        """
        if len(data) % 4 or not data:
            raise _damaged(f"{len(data)} bytes are no list of places")
        flat = np.frombuffer(data, ">u4").tolist()
        count, position = flat[0], 1
        rows: list[tuple[int, ...]] = []
        while position < len(flat) and len(rows) < count:
            size = flat[position]
            row = flat[position + 1 : position + 1 + size]
            if not size or len(row) != size or _unsound(row, elements):
                raise _damaged(f"row {len(rows) + 1} names places that cannot be")
            rows.append(tuple(row))
            position += 1 + size
        if position != len(flat) or len(rows) != count:
            raise _damaged(f"{len(rows)} rows in place of {count}")
        return cls(tuple(rows))


def _unsound(row: Sequence[int], elements: int) -> bool:
    return row[-1] >= elements or any(a >= b for a, b in itertools.pairwise(row))


def _damaged(what: str) -> UserError:
    return UserError(f"a message about duplicates is damaged ({what}); match the clouds again")
