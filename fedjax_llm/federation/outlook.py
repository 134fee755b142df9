"""What a federation will take, before it has keys, programs or a step of training.

Everything here follows from shapes, profiles and the schedule: a run that is built from the same
settings finds the same timeline and counts the same uploads. Of the opening of an encrypted sum
names, digests and signatures are left out (a few hundred bytes for each cloud that answers).

Notation: C clouds, N server steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.federation.assembly import Assembly, Settings
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.message import WeightCodec
from fedjax_llm.federation.planned_sums import PlannedSums, planned_sums
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.virtual import almanac_of
from fedjax_llm.models import Model


@dataclass(frozen=True, eq=False)
class Totals:
    """What a run has taken after each of its N server steps; every array rises.

    Attributes:
        seconds_N: virtual.
        up_N: bytes of all clouds towards the server.
        down_N: bytes of the server towards all clouds.
        dollars_N: rent and egress of all clouds and of the server.
        work_N: local steps whose result has landed, the mean over the clouds.
        tokens_N: positions that went through the model for what has landed, padding included; with
            Poisson sampling their expectation.
    """

    seconds_N: NDArray[np.float64]
    up_N: NDArray[np.int64]
    down_N: NDArray[np.int64]
    dollars_N: NDArray[np.float64]
    work_N: NDArray[np.float64]
    tokens_N: NDArray[np.float64]

    @property
    def bytes_N(self) -> NDArray[np.int64]:
        """Both ways."""
        return self.up_N + self.down_N


@dataclass(frozen=True, eq=False)
class Outlook:
    """A federation as far as virtual time and money go.

    Attributes:
        settings: what is asked for.
        parts: what is made of it.
        roster: the clients.
        calendar: of all its steps.
        sums: between the clouds; None on the devices.
        length: positions of a row.
    """

    settings: Settings
    parts: Assembly
    roster: Roster
    calendar: Calendar
    sums: PlannedSums | None
    length: int

    def sent(self, step: int) -> tuple[list[int], list[int]]:
        """Bytes that each cloud sends and receives in a server step, [C] and [C]."""
        roster, sizes = self.roster, self.parts.sizes
        phase = self.settings.rule.phase(step)
        here_K = roster.reachable(step)
        lands_K = here_K & self.calendar.landing(step).lands_K
        online, senders = roster.clouds_online(here_K), roster.clouds_online(lands_K)
        down = sizes.down(phase, lands_K)
        if self.sums is None:
            return sizes.up(phase, lands_K), down
        opening, count = self.sums.opening(), len(self.parts.codecs[phase])
        count += self.parts.recipe.sums_weights
        # Which clouds answer first moves no total.
        answers = set(online[: self.sums.answering(len(online))])
        up = []
        for cloud, name in enumerate(roster.names):
            own = self._upload(phase, name) if name in senders else 0
            if name in answers:
                own += count * opening.size.up
                down[cloud] += count * opening.size.down
            up.append(own)
        return up, down

    def _upload(self, phase: int, name: str) -> int:
        assert self.sums is not None
        size = sum(self.sums.upload_bytes(codec, name) for codec in self.parts.codecs[phase])
        if self.parts.recipe.sums_weights:
            size += self.sums.upload_bytes(WeightCodec, name)
        return size

    def totals(self, steps: int | None = None) -> Totals:
        """What the first steps take; all if None."""
        timeline, roster = self.calendar.timeline, self.roster
        count = len(timeline.steps) if steps is None else steps
        most_C = np.array([max(self._steps_of(c)) for c in range(len(roster.names))], float)
        rows_K = roster.steps_K * roster.batch_K
        rows_C = [rows_K[roster.members(c)].sum() for c in range(len(roster.names))]
        share_C = np.array(rows_C, float) / most_C
        known: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        bill = self.calendar.bill
        dollars_N = (bill.clouds_NxC.sum(axis=1) + bill.server_N)[:count]
        up_N, down_N, work_N, tokens_N = (np.zeros(count) for _ in range(4))
        for step in range(1, count + 1):
            landing = timeline.landing(step)
            online = tuple(roster.reachable(step).tolist())
            key = (self.settings.rule.phase(step), *sorted(landing), -1, *online)
            if key not in known:
                known[key] = self.sent(step)
            up, down = known[key]
            held_C = np.zeros(len(roster.names))
            for cloud, place in landing.items():
                held_C[cloud] = timeline.table_M["held"][place]
            at = step - 1
            up_N[at], down_N[at] = sum(up), sum(down)
            work_N[at] = held_C.mean()
            tokens_N[at] = float(held_C @ share_C) * self.length
        return Totals(
            np.array([step.ready for step in timeline.steps[:count]]),
            np.cumsum(up_N).astype(np.int64),
            np.cumsum(down_N).astype(np.int64),
            np.cumsum(dollars_N),
            np.cumsum(work_N),
            np.cumsum(tokens_N),
        )

    def _steps_of(self, cloud: int) -> list[int]:
        return [int(self.roster.steps_K[k]) for k in self.roster.members(cloud)]


def outlook(
    model: Model,
    settings: Settings,
    parts: Assembly,
    roster: Roster,
    *,
    steps: int,
    length: int,
    seed: int,
) -> Outlook:
    """Simulates a federation.

    Args:
        model: the frozen base; shapes are enough.
        settings: what is asked for.
        parts: from `assemble`, of these settings, or of some that send the same.
        roster: the clients, with the local steps of these settings.
        steps: server steps of the run.
        length: positions of a row.
        seed: of jitter and failures.

    Raises:
        UserError: a schedule that does not fit the clouds, or a step that is never done.
    """
    sums = planned_sums(settings.sum_mode, parts, roster)
    almanac = almanac_of(model, settings, parts, roster, sums, length, seed)
    return Outlook(settings, parts, roster, almanac.calendar(steps), sums, length)


def steps_within(totals: Sequence[float] | NDArray[np.float64], most: float) -> int:
    """How many steps stay within a budget.

    >>> steps_within([1.0, 2.0, 4.0], 2.5)
    2
    """
    return int(np.searchsorted(np.asarray(totals, np.float64), most, side="right"))
