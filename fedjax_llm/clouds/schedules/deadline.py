"""Deadline: the server takes what has arrived in time, if that is a quorum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds.schedules.schedule import (
    MOST_ATTEMPTS,
    Present,
    Schedule,
    opened,
    whole_pass,
)
from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Cycle, Log, Status, Step, Timeline
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Deadline(Schedule):
    """A round closes at its deadline, or when all have arrived; with too few, a little later.

    | arrived at the deadline | the round closes |
    |---|---|
    | all that take part, before it | with the last of them |
    | at least `quorum` | at the deadline |
    | fewer | with the arrival that makes the quorum, if that is within `grace` seconds |
    | fewer after `grace` too | never: all of it is lost and the round is tried again |

    A cloud that is late loses its cycle: it hears of the next version and begins with that. One
    that is always late never has a say; `FedBuff` and `Decoupled` are for such clouds.

    Attributes:
        seconds: from the broadcast to the deadline.
        quorum: fewest messages of a sum.
        grace: seconds to wait beyond the deadline for a quorum.
    """

    seconds: float
    quorum: int
    grace: float = math.inf

    name = "deadline"
    source = "arXiv 1902.01046, section 4"
    summary = "the server takes what has arrived by a deadline, if that is a quorum"

    def __post_init__(self) -> None:
        """Raises UserError for times or a quorum that cannot be."""
        if not 0 <= self.seconds < math.inf:
            raise UserError(f"deadline must be zero or more and finite seconds, got {self.seconds}")
        if not self.grace >= 0:
            raise UserError(f"grace must be zero or more seconds, got {self.grace}")
        if self.quorum < 1:
            raise UserError(f"quorum must be at least 1 cloud, got {self.quorum}")

    def check(self, clouds: int) -> None:
        """Raises UserError for a quorum of more clouds than there are."""
        check_quorum("quorum", self.quorum, clouds)

    def simulate(
        self,
        sites: Sequence[Site],
        steps: int,
        opening: Opening = Opening(),
        present: Present | None = None,
    ) -> Timeline:
        """See `Schedule.simulate`."""
        self.check(len(sites))
        log, now = Log(), 0.0
        for number in range(1, steps + 1):
            chosen = [True] * len(sites) if present is None else present(number)
            here = [site for site, own in zip(sites, chosen, strict=True) if own]
            check_quorum(f"round {number}: quorum", self.quorum, len(here))
            attempt, closed = 0, None
            while closed is None and attempt < MOST_ATTEMPTS:
                attempt += 1
                last = now + self.seconds + self.grace
                cycles = [c for site in here for c in whole_pass(site, now, number, last)]
                arrivals = [c.arrived for c in cycles if c.status is Status.RUNNING]
                closed = self._closed(now, len(here), arrivals)
                if closed is None:
                    _cut(log, cycles, last, None)
                    now = last
            if closed is None:
                raise UserError(
                    f"round {number}: in {MOST_ATTEMPTS} tries never {self.quorum} clouds were "
                    f"through within {self.seconds + self.grace:g} seconds; raise the deadline or "
                    "its grace, or lower the quorum"
                )
            _cut(log, cycles, closed, number)
            # See `Synchronous` for a round that too few can open.
            can_open = len(here) >= opening.holders
            ready = opened(here, closed, opening, number, log) if can_open else closed
            log.step(Step(number, now, closed, ready, attempt))
            now = ready
        return log.timeline(sites, opening)

    def _closed(self, now: float, clouds: int, arrivals: list[float]) -> float | None:
        """When the round closes; None if it never has a quorum."""
        deadline, ordered = now + self.seconds, sorted(arrivals)
        if len(ordered) == clouds and ordered[-1] <= deadline:
            return ordered[-1]
        if len(ordered) < self.quorum:
            return None
        reached = ordered[self.quorum - 1]
        if reached <= deadline:
            return deadline
        return reached if reached <= deadline + self.grace else None


def check_quorum(what: str, quorum: int, clouds: int) -> None:
    """Raises UserError for a quorum of more clouds than there are."""
    if quorum > clouds:
        raise UserError(f"{what} = {quorum} is more than the {clouds} clouds that can be there")


def _cut(log: Log, cycles: Sequence[Cycle], closed: float, number: int | None) -> None:
    """Adds what had begun when a round closed; of one without a quorum nothing lands."""
    for cycle in cycles:
        if cycle.start > closed:
            continue
        if cycle.ended > closed or (number is None and cycle.status is Status.RUNNING):
            received, trained, arrived = (
                at if at <= closed else math.nan
                for at in (cycle.received, cycle.trained, cycle.arrived)
            )
            ended = min(cycle.ended, closed)
            log.add(Cycle(*cycle[:4], cycle.start, received, trained, arrived, ended, Status.LATE))
        elif cycle.status is Status.RUNNING:
            log.landed(log.add(cycle), number or 0)
        else:
            log.add(cycle)
