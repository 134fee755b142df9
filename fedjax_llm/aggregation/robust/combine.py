"""What a way to combine individual messages is: one vector out of K, whatever a few of them hold.

Letters: K clients, P parameters.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import jax

from fedjax_llm.errors import UserError

PyTree = Any


class Combine(ABC):
    """A pure way to combine K messages, each of which the server sees, into one.

    Subclasses are frozen dataclasses: parameters are static, `combine` runs under `jit` for any
    K and P, and who is present is traced.

    Attributes:
        name: the name in the run file.
        source: the paper, an arXiv id.
        summary: one line for help texts.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]

    def init(self, size: int) -> PyTree:
        """Returns what is carried into the first round, for messages of `size` parameters."""
        del size
        return ()

    @abstractmethod
    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Combines the messages of those present.

        | input                                   | output                                     |
        |-----------------------------------------|--------------------------------------------|
        | row of an absent client, NaN included   | no influence                               |
        | row of a present client that is not finite | undefined: mark such a client absent    |
        | nobody present                          | zeros (`CentredClipping`: its last vector) |
        | fewer present than `check` asks for     | finite, without the guarantee of the paper |

        Args:
            messages_KxP: float32, finite where present.
            present_K: bool.
            memory: from `init` or the last round.

        Returns:
            [P] float32, which stands for the mean of the messages, and the memory.
        """

    @abstractmethod
    def check(self, clients: int) -> None:
        """Raises UserError when `clients`, the fewest of a round, are too few to be robust."""


def require(name: str, clients: int, least: int, why: str) -> None:
    """Raises UserError when there are fewer than `least` clients; `why` is put in brackets."""
    if clients < least:
        raise UserError(
            f"{name} needs at least {least} clients in a round ({why}), got {clients}; "
            "call more clients or assume fewer malicious ones"
        )


def require_count(name: str, parameter: str, value: int, least: int) -> None:
    """Raises UserError when a parameter that counts something is below `least`."""
    if value < least:
        raise UserError(f"{parameter} of {name} must be at least {least}, got {value}")
