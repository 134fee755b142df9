"""One cloud as the simulation sees it: how long it receives, trains and sends, and when it is down.

A cycle of a cloud that goes down is lost with all that it had received and trained in it; what the
cloud had sent before stays sent.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

Transfer = Callable[[float, int, int], float]


class Presence(Protocol):
    """When a cloud is up; `availability` has the kinds."""

    def next_failure(self, seconds: float) -> float:
        """The first moment from `seconds` on at which it is down; infinite for never."""

    def next_up(self, seconds: float) -> float:
        """The first moment from `seconds` on at which it is up."""


class Size(NamedTuple):
    """Bytes that a cloud receives, and that it sends."""

    down: int
    up: int


class Freight(NamedTuple):
    """The messages of a cloud.

    Attributes:
        sizes: of the rounds, which take them in turn.
        whole: bytes of a start afresh where rounds send piece by piece; as a round's if None.
    """

    sizes: tuple[Size, ...]
    whole: int | None = None


class Opening(NamedTuple):
    """What opening an encrypted sum takes: so many clouds receive and answer.

    Attributes:
        holders: clouds that have to answer, the fastest do; 0 for a sum that nobody has to open.
        size: bytes of each.
    """

    holders: int = 0
    size: Size = Size(0, 0)


class Site:
    """A cloud with its links, its speed and its failures.

    Args:
        name: of the cloud.
        place: among the clouds.
        down: `(start, bytes, index) -> end`, seconds; the index addresses what is random in it.
        up: the same towards the server.
        step_seconds: of one local step.
        local_steps: of a cycle.
        sizes: of the rounds, which take them in turn.
        whole: bytes of the whole model that is trained, for a cloud that starts afresh where
            rounds send it piece by piece; what the round sends if None.
        presence: when it is up; always if None.

    Attributes:
        next_up: the first moment from one on at which it is up.
        next_failure: the first moment from one on at which it is down; infinite for never.
    """

    __slots__ = (
        "_down",
        "_presence",
        "_received",
        "_sent",
        "_sizes",
        "_up",
        "_whole",
        "local_steps",
        "name",
        "next_failure",
        "next_up",
        "place",
        "step_seconds",
    )

    def __init__(
        self,
        name: str,
        place: int,
        down: Transfer,
        up: Transfer,
        step_seconds: float,
        local_steps: int,
        sizes: Sequence[Size],
        whole: int | None = None,
        presence: Presence | None = None,
    ) -> None:
        self.name, self.place = name, place
        self.step_seconds, self.local_steps = step_seconds, local_steps
        self._down, self._up, self._sizes, self._presence = down, up, tuple(sizes), presence
        self._whole = whole
        self._received = self._sent = 0  # transfers, each of which has its own jitter
        self.next_up = _at_once if presence is None else presence.next_up
        self.next_failure = _never if presence is None else presence.next_failure

    @property
    def freight(self) -> "Freight":
        """Bytes of its messages."""
        return Freight(self._sizes, self._whole)

    def receive(self, start: float, step: int) -> float:
        """When it has the model that a step begins with."""
        self._received += 1
        return self._down(start, self._sizes[(step - 1) % len(self._sizes)].down, self._received)

    def receive_whole(self, start: float) -> float:
        """When it has all that is trained."""
        if self._whole is None:
            return self.receive(start, 1)
        self._received += 1
        return self._down(start, self._whole, self._received)

    def send(self, start: float, step: int) -> float:
        """When its message for a step is at the server."""
        self._sent += 1
        return self._up(start, self._sizes[(step - 1) % len(self._sizes)].up, self._sent)

    def answer(self, start: float, size: Size) -> float:
        """When its part in opening a sum is at the server; infinite if it is down before that."""
        self._received += 1
        self._sent += 1
        asked = self._down(start, size.down, self._received)
        answered = self._up(asked, size.up, self._sent)
        return answered if self.next_failure(start) > answered else math.inf

    def train(self, start: float, steps: int) -> float:
        """When it has taken so many local steps."""
        return start + steps * self.step_seconds


def _at_once(seconds: float) -> float:
    return seconds


def _never(seconds: float) -> float:
    del seconds
    return math.inf
