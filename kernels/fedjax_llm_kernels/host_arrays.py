"""Arrays on the host that JAX on a CPU reads where they lie.

A jitted function copies a numpy argument unless it starts at a multiple of 64 bytes. Whoever passes
one of these must leave it alone until the result is there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """As ``np.empty``, at a multiple of 64 bytes.

    >>> made = aligned_empty((3, 5), np.int32)
    >>> made.shape, made.dtype, made.ctypes.data % 64
    ((3, 5), dtype('int32'), 0)
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
