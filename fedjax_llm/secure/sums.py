"""What every secure sum promises: the interface, its result and its refusals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused


class BadMessage(Refused):
    """Bytes that are not the message they should be; ``sender`` names whose they are."""

    def __init__(self, sender: str, reason: str) -> None:
        super().__init__(f"message of {sender!r} refused: {reason}")
        self.sender = sender


class BelowThreshold(Refused):
    """Fewer clouds are alive than decryption takes; nothing was decrypted."""


class WrongSum(Refused):
    """The decrypted canary or range is wrong: the result is garbage and is not returned."""


@dataclass(frozen=True)
class SumResult:
    """One round's sum and what it cost.

    Attributes:
        total_P: int64, the exact sum over the participants.
        participants: the clients whose messages were added, sorted.
        bytes_up: per cloud that holds a key share, what it sent for this sum.
        bytes_down: per cloud that holds a key share, what it received for this sum. The clients'
            own uploads are the lengths of their messages.
        seconds: wall-clock seconds per stage.
    """

    total_P: NDArray[np.int64]
    participants: tuple[str, ...]
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class SecureSum(Protocol):
    """Adds integer vectors of clients. Sums of different kinds give bit-identical totals.

    A round number serves for one sum only, and round numbers increase.
    """

    def statement(self) -> str:
        """One line on who can decrypt what; printed when a run starts."""

    def check_alive(self, alive: Sequence[str]) -> None:
        """Raises BelowThreshold if these clouds could not decrypt; `sum` checks it again."""

    def encode_message(self, client: str, round_number: int, ints_P: NDArray[np.integer]) -> bytes:
        """What leaves the client.

        Raises:
            Refused: wrong length, not integers, or an entry beyond the agreed bound.
        """

    def sum(
        self, messages: Mapping[str, bytes], round_number: int, alive: Sequence[str] = ()
    ) -> SumResult:
        """Adds the messages that arrived.

        Args:
            messages: client -> its message of this round; who dropped out is simply absent.
            round_number: the round all messages must belong to.
            alive: the clouds that can help to decrypt now.

        Raises:
            BadMessage: a message is damaged, of another round, of another client or a duplicate.
            BelowThreshold: too few clouds are alive.
            WrongSum: the decryption is garbage.
            Refused: fewer messages than ``minimum_clients``.
        """


def checked_ints(
    client: str, ints_P: NDArray[np.integer], count: int, max_abs: int
) -> NDArray[np.int64]:
    """The client's vector as int64, or a refusal before anything is sent."""
    array = np.asarray(ints_P)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise Refused(
            f"client {client!r} must send {count} integers, got shape {array.shape} of "
            f"{array.dtype}; encode with FixedPoint first"
        )
    outside = (array > max_abs) | (array < -max_abs)
    if outside.any():
        where = int(np.argmax(outside))
        raise Refused(
            f"client {client!r}: entry {where} is {int(array[where])}, beyond the agreed bound "
            f"{max_abs}; lower the clip norm or raise the bound"
        )
    return array.astype(np.int64)


def checked_clients(clients: Sequence[str], minimum: int, summands: int) -> None:
    """Refuses a sum so small that it is one client's message, or larger than was planned for."""
    if len(clients) < minimum:
        raise Refused(
            f"a sum needs at least {minimum} clients, {len(clients)} sent a message "
            f"({', '.join(sorted(clients)) or 'none'}); wait for more or skip the round"
        )
    if len(clients) > summands:
        raise Refused(
            f"{len(clients)} clients sent a message, the sum is exact up to {summands}; "
            "set up the sum for more summands"
        )
