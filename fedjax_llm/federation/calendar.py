"""The calendar: what a timeline of clouds means for each client, as arrays for the programs.

Notation: K clients, in the order of the run; P fragments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds.cloud import Cloud
from fedjax_llm.clouds.money import Bill, bill
from fedjax_llm.clouds.schedules import Schedule
from fedjax_llm.clouds.timeline import Status, Timeline

# What a message with few local steps counts at least, over one with many.
_LEAST_COUNT = 0.25


@dataclass(frozen=True)
class Wave:
    """Cycles that run as one batch; leaves [K], what is not in it is False or 0.

    Attributes:
        trains_K: who trains.
        sends_K: whose message lands in a step.
        fresh_K: who starts from the global model.
        merged_KxP: the fragments that have come back since the client's last cycle.
        turn_K: int32, counts a client's cycles from 1; addresses its randomness.
        lands_K: int32, the step that takes the message.
        slot_K: int32, where the message is kept until then.
        factor_K: float32, what it counts beside the client's own weight.
    """

    trains_K: NDArray[np.bool_]
    sends_K: NDArray[np.bool_]
    fresh_K: NDArray[np.bool_]
    merged_KxP: NDArray[np.bool_]
    turn_K: NDArray[np.int32]
    lands_K: NDArray[np.int32]
    slot_K: NDArray[np.int32]
    factor_K: NDArray[np.float32]


@dataclass(frozen=True)
class Landing:
    """The messages that a step takes.

    Attributes:
        lands_K: whose.
        slot_K: int32, where each is kept.
        factor_K: float32, what each counts before its age is seen: by its local steps.
    """

    lands_K: NDArray[np.bool_]
    slot_K: NDArray[np.int32]
    factor_K: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Calendar:
    """A timeline, by client.

    Attributes:
        schedule: that made it.
        timeline: of the clouds.
        cloud_K: the cloud of each client.
        clouds: profiles, in order, seeded as the simulation was.
        fragments: P, in how many parts the layers travel in turn.
    """

    schedule: Schedule
    timeline: Timeline
    cloud_K: Sequence[int]
    clouds: Sequence[Cloud]
    fragments: int = 1

    @cached_property
    def bill(self) -> Bill:
        """What the clouds and the server pay in each step."""
        return bill(self.timeline, self.clouds)

    @property
    def slots(self) -> int:
        """Messages of one client that may be under way at once."""
        return max(self.timeline.slots.values(), default=0) + 1

    def fragment(self, step: int) -> int:
        """The fragment that a step averages."""
        return (step - 1) % self.fragments

    def waves(self, step: int) -> list[Wave]:
        """What runs before a step, in order: all that starts from the version before it."""
        return [self._wave(wave) for wave in self.timeline.waves(step - 1)]

    def landing(self, step: int) -> Landing:
        """What the step takes."""
        places = self.timeline.landing(step)
        return Landing(
            self._spread(dict.fromkeys(places, True), np.bool_),
            self._spread({c: self._slots[place] for c, place in places.items()}, np.int32),
            self._spread({c: self._held(place) for c, place in places.items()}, np.float32),
        )

    def _wave(self, places: dict[int, int]) -> Wave:
        cycles = {cloud: self.timeline.cycle(place) for cloud, place in places.items()}
        sends = {cloud: place for cloud, place in places.items() if cycles[cloud].lands}
        merged_KxP = np.zeros((len(self.cloud_K), self.fragments), bool)
        for k, cloud in enumerate(self.cloud_K):
            if cloud in cycles and not cycles[cloud].fresh:
                last = self._before[places[cloud]]
                for step in range(last + 1, cycles[cloud].version + 1):
                    merged_KxP[k, self.fragment(step)] = True
        return Wave(
            self._spread(dict.fromkeys(places, True), np.bool_),
            self._spread(dict.fromkeys(sends, True), np.bool_),
            self._spread({c: cycle.fresh for c, cycle in cycles.items()}, np.bool_),
            merged_KxP,
            self._spread({c: int(self._turns[place]) for c, place in places.items()}, np.int32),
            self._spread({c: cycles[c].lands for c in sends}, np.int32),
            self._spread({c: self._slots[place] for c, place in sends.items()}, np.int32),
            self._spread({c: self._factor(place) for c, place in sends.items()}, np.float32),
        )

    def _spread(self, by_cloud: Mapping[int, float], dtype: Any) -> NDArray[Any]:
        return np.array([by_cloud.get(cloud, 0) for cloud in self.cloud_K], dtype)

    def _held(self, place: int) -> float:
        """Local steps in a message, over twice those of an ordinary one so far; 1/4 to 1.

        At most 1, as the privacy plan has it; and not over the most in any message, which one cloud
        that was away for long would make so large that fixed point loses all others. At least 1/4,
        since what lands is divided by the sum of these: a step of short messages alone would be
        divided by next to nothing, and the rounding and the noise in its sum with it.
        """
        if not self.schedule.replicas:
            return 1.0
        row = self.timeline.table_M[place]
        whole = 2 * self._ordinary[int(row["lands"])]
        return min(1.0, max(_LEAST_COUNT, float(row["held"]) / whole))

    def _factor(self, place: int) -> float:
        row = self.timeline.table_M[place]
        behind = int(row["lands"] - 1 - row["version"])
        return self._held(place) * self.schedule.staleness_weight(behind)

    @cached_property
    def _ordinary(self) -> dict[int, float]:
        """Local steps in an ordinary message, by the step that it lands in.

        The median of those that have landed before, which is what a cloud can know when it sends;
        of the first step's own, where there are none.
        """
        table_M = self.timeline.table_M
        landed = table_M[table_M["status"] == Status.LANDED]
        found = {}
        for step in np.unique(landed["lands"]).tolist():
            before = landed["held"][landed["lands"] < step]
            own = landed["held"][landed["lands"] == step]
            found[step] = max(1.0, float(np.median(before if len(before) else own)))
        return found

    @cached_property
    def _slots(self) -> dict[int, int]:
        return self.timeline.slots

    def cycles(self, step: int) -> NDArray[np.int64]:
        """How often each cloud has begun to look at its data for the steps up to this one, [C].

        Where all wait for each other a cycle that is begun again repeats its randomness, and so its
        message: a round counts once. Elsewhere every one counts, failed and late ones too.
        """
        table_M, count = self.timeline.table_M, len(self.timeline.names)
        own = table_M[table_M["version"] < step]
        if self.schedule.timely:
            own = np.unique(own[["cloud", "version"]])
        return np.bincount(own["cloud"], minlength=count)

    @cached_property
    def _turns(self) -> NDArray[np.int64]:
        """The number of each cycle among those of its cloud; of its round where all wait.

        Failed cycles count: another one from another version must not repeat their noise.
        """
        table_M = self.timeline.table_M
        if self.schedule.timely:
            return np.asarray(table_M["version"] + 1, np.int64)
        count = [0] * len(self.timeline.names)
        turns_M = np.zeros(len(table_M), np.int64)
        for place, cloud in enumerate(table_M["cloud"].tolist()):
            count[cloud] += 1
            turns_M[place] = count[cloud]
        return turns_M

    @cached_property
    def _before(self) -> dict[int, int]:
        """The version that its cloud had before each cycle."""
        table_M = self.timeline.table_M
        last: dict[int, int] = {}
        found = {}
        for place in self.timeline.counted:
            cloud, version = int(table_M["cloud"][place]), int(table_M["version"][place])
            found[place] = last.get(cloud, version)
            last[cloud] = version
        return found
