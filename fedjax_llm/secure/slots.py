"""Several signed integers in one plaintext slot: digits of a balanced number system.

With every sum in [-M, M] the radix is B = 2M + 1, the digits are balanced (-M..M), and a slot
holds x_0 + x_1 B + ... + x_{k-1} B^{k-1}, whose absolute value is at most (B^k - 1) / 2. Packing is
linear and balanced digits are unique, so the digits of a sum of slots are the sums of the digits:
no carry, no offset for the sign, whatever the number of summands that M allows for.
"""

import numpy as np
from numpy.typing import NDArray


def pack_slots(ints_P: NDArray[np.int64], radix: int, digits: int) -> NDArray[np.int64]:
    """int64 [P] -> int64 [ceil(P / digits)]; the last slot is filled up with zeros."""
    padded = np.zeros(-(-ints_P.size // digits) * digits, np.int64)
    padded[: ints_P.size] = ints_P
    columns = padded.reshape(-1, digits)
    slots = columns[:, -1].copy()
    for digit in range(digits - 2, -1, -1):
        slots = slots * radix + columns[:, digit]
    return slots


def unpack_slots(slots_S: NDArray[np.int64], radix: int, digits: int) -> NDArray[np.int64]:
    """int64 [S] -> int64 [S * digits]; what exceeds the last digit stays in it.

    A slot beyond (radix**digits - 1) / 2 thus shows as a last digit beyond (radix - 1) / 2.
    """
    half = radix // 2
    columns = np.empty((slots_S.size, digits), np.int64)
    rest = slots_S
    for digit in range(digits - 1):
        columns[:, digit] = (rest + half) % radix - half
        rest = (rest - columns[:, digit]) // radix
    columns[:, -1] = rest
    return columns.reshape(-1)
