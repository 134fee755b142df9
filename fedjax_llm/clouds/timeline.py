"""The timeline of a run: what every cloud does when, in virtual seconds, and which step takes it.

A timeline follows from profiles, schedule and sizes of messages alone, never from what is trained
nor from this machine's clock. So it is known before the first step of training: who takes part in
which update, from which version of the model, with which weight, is public, and a run that is
resumed finds the same timeline again.

Words: a *version* is the global model after so many server steps; version 0 is the start. A *cycle*
is one pass of a cloud: receive a version, train, send. It *lands* in the server step whose sum
holds its message.
"""

import enum
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds.site import Freight, Opening, Site


class Status(enum.IntEnum):
    """How a cycle ended.

    LANDED in a server step; LATE, cut off because the step had closed; FAILED, the cloud went down
    and lost it; LOCAL, the cloud trained on without sending, and its next message holds this cycle
    too; RUNNING, the last step was over before it ended.
    """

    LANDED = 0
    LATE = 1
    FAILED = 2
    LOCAL = 3
    RUNNING = 4


class Cycle(NamedTuple):
    """One pass of a cloud. Times are virtual seconds; NaN for what it did not reach.

    Attributes:
        cloud: place among the clouds.
        version: what it starts from.
        steps: local steps.
        fresh: whether it starts from the global model rather than from its own replica.
        start: it begins to receive; without anything to receive, to train.
        received: it begins to train.
        trained: it begins to send.
        arrived: its message is at the server.
        ended: the cloud is through with it, or lost it.
        status: how it ended.
        lands: the server step that takes it, from 1; 0 for none.
        held: local steps in its message: its own and those of LOCAL cycles before it.
    """

    cloud: int
    version: int
    steps: int
    fresh: bool
    start: float
    received: float
    trained: float
    arrived: float
    ended: float
    status: Status
    lands: int = 0
    held: int = 0


class Step(NamedTuple):
    """One server step.

    Attributes:
        number: from 1; its result is the version of this number.
        opened: from when on messages for it count.
        closed: the last message that it takes has arrived, or it waits no longer.
        ready: the sum is open and the new version is made.
        attempts: how often it was tried; above 1 where a quorum was missed.
    """

    number: int
    opened: float
    closed: float
    ready: float
    attempts: int = 1


class Broadcast(NamedTuple):
    """A version on its way to clouds that do not begin a cycle with receiving it.

    Attributes:
        version: that is sent.
        start: of the transfer to each cloud, NaN for one that it does not go to.
        end: of the same.
    """

    version: int
    start: Sequence[float]
    end: Sequence[float]


class Answer(NamedTuple):
    """A cloud's part in opening the sum of a step: it is asked at `start`, through at `end`."""

    cloud: int
    step: int
    start: float
    end: float


_TYPES = {int: "i8", bool: "i8", Status: "i8", float: "f8"}
_KINDS = [(name, _TYPES[kind]) for name, kind in get_type_hints(Cycle).items()]
_WIDTH = len(_KINDS)
_TRAINED, _ARRIVED, _ENDED, _STATUS, _LANDS = (
    Cycle._fields.index(name) for name in ("trained", "arrived", "ended", "status", "lands")
)


class Log:
    """Collects cycles and steps.

    Cycles are in one flat array of doubles: a million of them take 96 MB, and one call adds one.
    The integers among them stay far below 2^53, to which doubles are exact.
    """

    def __init__(self) -> None:
        self._flat = array("d")
        self._count = 0
        self._steps: list[Step] = []
        self._broadcasts: list[Broadcast] = []
        self._answers: list[Answer] = []

    def add(self, cycle: Cycle) -> int:
        """Adds a cycle and returns its place."""
        place = self._count
        self._flat.extend(cycle)
        self._count = place + 1
        return place

    def sent(self, place: int, arrived: float) -> None:
        """Says that a cycle's message is on its way."""
        first = place * _WIDTH
        self._flat[first + _STATUS] = Status.RUNNING
        self._flat[first + _ARRIVED] = self._flat[first + _ENDED] = arrived

    def kept(self, place: int) -> None:
        """Says that a message came for nothing: its cloud trains on with what was in it."""
        first = place * _WIDTH
        self._flat[first + _STATUS] = Status.LOCAL
        self._flat[first + _ENDED] = self._flat[first + _TRAINED]

    def landed(self, place: int, step: int) -> None:
        """Says which step took a cycle."""
        first = place * _WIDTH
        self._flat[first + _STATUS] = Status.LANDED
        self._flat[first + _LANDS] = step

    def step(self, step: Step) -> None:
        """Adds a server step."""
        self._steps.append(step)

    def broadcast(self, broadcast: Broadcast) -> None:
        """Adds a broadcast that is not the beginning of cycles."""
        self._broadcasts.append(broadcast)

    def answer(self, answer: Answer) -> None:
        """Adds a cloud's part in opening a sum."""
        self._answers.append(answer)

    def timeline(self, sites: Sequence[Site], opening: Opening = Opening()) -> "Timeline":
        """All that was collected of these clouds, whose sums open in this way."""
        table_M = np.empty(self._count, _KINDS)
        flat_MxF = np.asarray(self._flat, np.float64).reshape(self._count, _WIDTH)
        for place, name in enumerate(Cycle._fields):
            table_M[name] = flat_MxF[:, place]
        return Timeline(
            tuple(site.name for site in sites),
            tuple(self._steps),
            table_M,
            tuple(self._broadcasts),
            tuple(self._answers),
            tuple(site.freight for site in sites),
            opening,
        )


@dataclass(frozen=True, eq=False)
class Timeline:
    """Everything that happens in a run, before it happens.

    Attributes:
        names: of the clouds.
        steps: the server steps, in order.
        table_M: the M cycles as a structured array with the fields of `Cycle`, in the order in
            which the simulation met them.
        broadcasts: of versions, those with which a cycle begins left out.
        answers: of the clouds that open sums.
        freight: the sizes of each cloud's messages.
        opening: of each sum.
    """

    names: tuple[str, ...]
    steps: tuple[Step, ...]
    table_M: NDArray[np.void] = field(repr=False)
    broadcasts: tuple[Broadcast, ...] = field(repr=False)
    answers: tuple[Answer, ...] = field(repr=False)
    freight: tuple[Freight, ...] = field(repr=False)
    opening: Opening

    @property
    def seconds(self) -> float:
        """When the last version is ready; 0 without a step."""
        return self.steps[-1].ready if self.steps else 0.0

    def until(self, step: int) -> "Timeline":
        """The timeline of a run that ends with a step; what is under way then is RUNNING."""
        if step >= len(self.steps):
            return self
        steps = self.steps[:step]
        end = steps[-1].ready if steps else 0.0
        table_M = self.table_M[self.table_M["start"] < end].copy()
        under_way_M = (table_M["ended"] > end) | (table_M["lands"] > step)
        table_M["status"][under_way_M] = Status.RUNNING
        table_M["lands"][under_way_M] = 0
        return replace(
            self,
            steps=steps,
            table_M=table_M,
            broadcasts=tuple(own for own in self.broadcasts if own.version <= step),
            answers=tuple(own for own in self.answers if own.step <= step),
        )

    def between(self, step: int) -> float:
        """Seconds from the version before a step to its own."""
        return self.steps[step - 1].ready - (self.steps[step - 2].ready if step > 1 else 0.0)

    @property
    def cycles(self) -> Iterator[Cycle]:
        """All cycles in their order."""
        return map(self.cycle, range(len(self.table_M)))

    def cycle(self, place: int) -> Cycle:
        """The cycle at a place of the table."""
        cycle = Cycle(*self.table_M[place].tolist())
        return cycle._replace(fresh=bool(cycle.fresh), status=Status(cycle.status))

    def waves(self, version: int) -> list[dict[int, int]]:
        """The cycles that begin with a version and count: they land, or are part of what lands.

        Returns:
            Batches in the order in which they run: place by cloud.
        """
        waves: list[dict[int, int]] = []
        for place in self._starting.get(version, ()):
            cloud = int(self.table_M["cloud"][place])
            wave = next((wave for wave in waves if cloud not in wave), None)
            if wave is None:
                waves.append(wave := {})
            wave[cloud] = place
        return waves

    def landing(self, step: int) -> dict[int, int]:
        """The cycles that a step takes: place by cloud."""
        return {int(self.table_M["cloud"][p]): p for p in self._landing.get(step, ())}

    @cached_property
    def most_behind(self) -> int:
        """Most versions that a landing cycle's is older than the one that its step starts from."""
        landed = self.table_M[self.table_M["status"] == Status.LANDED]
        return int((landed["lands"] - 1 - landed["version"]).max(initial=0))

    @cached_property
    def slots(self) -> dict[int, int]:
        """Where the message of each landing cycle, by its place, is kept until its step.

        A cloud has several messages under way where it trains on before one has landed.
        """
        found: dict[int, int] = {}
        taken: dict[int, list[int]] = {}  # by cloud: the step after which each slot is free
        for place in self.counted:
            row = self.table_M[place]
            if row["status"] != Status.LANDED:
                continue
            free = taken.setdefault(int(row["cloud"]), [])
            slot = next((i for i, step in enumerate(free) if step <= row["version"]), len(free))
            if slot == len(free):
                free.append(0)
            free[slot] = int(row["lands"])
            found[place] = slot
        return found

    @cached_property
    def counted(self) -> list[int]:
        """The places of all cycles that run, each cloud's in their order."""
        return np.flatnonzero(self._counts_M).tolist()

    @cached_property
    def _starting(self) -> dict[int, list[int]]:
        return _grouped(self.table_M["version"], np.flatnonzero(self._counts_M))

    @cached_property
    def _counts_M(self) -> NDArray[np.bool_]:
        """Cycles that land, or that a message holds which lands."""
        counts_M = self.table_M["status"] == Status.LANDED
        if not (self.table_M["status"] == Status.LOCAL).any():
            return counts_M
        lands_later = dict.fromkeys(range(len(self.names)), False)
        for place in range(len(counts_M) - 1, -1, -1):
            row = self.table_M[place]
            cloud, status = int(row["cloud"]), Status(int(row["status"]))
            if status is Status.LANDED:
                lands_later[cloud] = True
            elif status is Status.FAILED:
                lands_later[cloud] = False
            elif status is Status.LOCAL and lands_later[cloud]:
                counts_M[place] = True
            if row["fresh"]:
                lands_later[cloud] = False
        return counts_M

    @cached_property
    def _landing(self) -> dict[int, list[int]]:
        landed_M = self.table_M["status"] == Status.LANDED
        return _grouped(self.table_M["lands"], np.flatnonzero(landed_M))


def _grouped(key_M: NDArray[np.int64], places: NDArray[np.int64]) -> dict[int, list[int]]:
    """The places of each key, in their order."""
    found: dict[int, list[int]] = {}
    for place, own in zip(places.tolist(), key_M[places].tolist(), strict=True):
        found.setdefault(own, []).append(place)
    return found
