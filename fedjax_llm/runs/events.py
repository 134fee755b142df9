"""What a running job tells whoever watches it; the command line turns these into progress bars.

A job calls `on_event(event)` with one of these; it never prints.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedjax_llm.runs.folder.metrics import RoundRecord


@dataclass(frozen=True)
class Stage:
    """A stage outside the rounds begins, such as `Stage("model", "smollm2-135m, 134.5 M")`."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence for the user: who can decrypt, what is protected, a checkpoint passed over."""

    text: str


@dataclass(frozen=True)
class RoundStarted:
    """Round `round` (from 1) of `rounds` begins; 0 is the evaluation before training."""

    round: int
    rounds: int


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `what` ("train", "encrypt", "evaluate", ...) are finished."""

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class RoundFinished:
    """A round is evaluated, recorded in metrics.jsonl and checkpointed."""

    record: RoundRecord


Event = Stage | Note | RoundStarted | Progress | RoundFinished
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `on_event` for those who do not watch."""
