"""Where a Pallas kernel runs, and how large its blocks may be.

Every kernel here that is written by hand has up to three forms behind one function: plain JAX
("xla"), Pallas for TPU (Mosaic) and Pallas for GPU. The two Pallas forms differ in what they may
rest on: a TPU runs a grid's programs one after the other and keeps a block in fast memory between
them, a GPU runs them all at once and reads what it addresses.

The GPU forms are lowered by Pallas' Triton backend, which JAX 0.12 still has and calls deprecated;
it warns with a DeprecationWarning when it lowers. They use loads, stores, products and loops, and
nothing that only that backend knows but masks, so that a move to Mosaic GPU is a new driver and
not a new algorithm.

Modules of Pallas kernels are imported by the branch that runs one: importing Pallas takes 0.14 s,
which would be added to the start of every program, and few have a kernel.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

Implementation = Literal["xla", "pallas"]
Form = Callable[..., Any]

# Fast memory that one TPU kernel plans with: below the 16 MiB that Mosaic grants by default.
TPU_BYTES = 12 << 20
# A tile of a TPU: 8 rows of 128 lanes of 32 bits.
ROWS, LANES = 8, 128


def by_platform(tpu: Form, gpu: Form, *arguments: Any) -> Any:
    """Runs the Pallas form of the platform that the program is lowered for.

    Args:
      tpu: `tpu(*arguments, interpret=...)`; on a CPU it is interpreted, for tests.
      gpu: `gpu(*arguments, interpret=...)`.
      arguments: Arrays.
    """

    def of(form: Form, interpret: bool) -> Form:
        return lambda *arrays: form(*arrays, interpret=interpret)

    return jax.lax.platform_dependent(
        *arguments, cpu=of(tpu, True), tpu=of(tpu, False), default=of(gpu, False)
    )


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is none."""
    if implementation not in ("xla", "pallas", None):
        raise ValueError(
            f'implementation must be "xla", "pallas" or None, got {implementation!r}; None takes '
            "the table of fedjax_llm_kernels.choice"
        )


def whole_blocks(size: int, block: int) -> int:
    """How many blocks cover the size.

    >>> whole_blocks(129, 128), whole_blocks(128, 128)
    (2, 1)
    """
    return -(-size // block)


def power_of_two_at_most(limit: float, least: int, most: int) -> int:
    """The largest power of two that is at most `limit`, within [least, most].

    >>> power_of_two_at_most(300, 8, 1024), power_of_two_at_most(3, 8, 1024)
    (256, 8)
    """
    size = least
    while 2 * size <= min(limit, most):
        size *= 2
    return size
