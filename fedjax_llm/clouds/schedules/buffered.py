"""Buffered asynchronous: so many messages make a server step, whoever they come from."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds.schedules.deadline import check_quorum
from fedjax_llm.clouds.schedules.schedule import (
    MOST_ATTEMPTS,
    Present,
    Schedule,
    one_pass,
    opened,
)
from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Log, Status, Step, Timeline
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class FedBuff(Schedule):
    """Clouds train without waiting for each other, and `size` messages make a step.

    A cloud whose message has arrived begins with the newest version at once; it waits for one if
    there is none newer than that which it began with last. A buffer holds one message of a cloud at
    most, so that the sum of a step changes by one message when a cloud is taken out: a second one
    waits for the next buffer.

    Under an encrypted sum a message is encrypted for the step that takes it. The server knows that
    before: it hears of an upload when that begins, and closes a buffer over uploads it has named.
    The simulation knows when they will be there.

    Attributes:
        size: messages of a step, K of the paper.
        exponent: a message that is s versions old counts (1 + s)^-exponent; 0.5 in the paper.
    """

    size: int
    exponent: float = 0.5

    name = "buffered"
    source = "arXiv 2106.06639, algorithm 1; staleness weight section 5"
    summary = "asynchronous: each so many messages make a step, old ones count less"
    waits = False

    def __post_init__(self) -> None:
        """Raises UserError for a size or exponent out of range."""
        if self.size < 1:
            raise UserError(f"buffer must hold at least 1 message, got {self.size}")
        if not 0 <= self.exponent < math.inf:
            raise UserError(f"staleness exponent must be zero or more, got {self.exponent}")

    def check(self, clouds: int) -> None:
        """Raises UserError for a buffer that so many clouds cannot fill."""
        check_quorum("buffer", self.size, clouds)

    def staleness_weight(self, behind: int) -> float:
        """(1 + behind)^-exponent."""
        return float((1 + behind) ** -self.exponent)

    def simulate(
        self,
        sites: Sequence[Site],
        steps: int,
        opening: Opening = Opening(),
        present: Present | None = None,
    ) -> Timeline:
        """See `Schedule.simulate`."""
        assert present is None
        self.check(len(sites))
        log = Log()
        # Arrivals of messages, and clouds that are back after a failure: then without a place.
        events: list[tuple[float, int, int]] = []
        begun = [-1] * len(sites)  # version of each cloud's last cycle
        in_vain = [0] * len(sites)  # cycles that failed since one was through
        version, ready = 0, 0.0
        early: list[tuple[float, int, int]] = []  # their clouds have a message in the buffer
        idle = list(range(len(sites)))  # clouds that wait for a newer version

        def begin(cloud: int, now: float) -> None:
            site = sites[cloud]
            start = site.next_up(max(now, ready))
            if start == math.inf:
                return
            begun[cloud] = version
            cycle = one_pass(site, start, version + 1)
            place = log.add(cycle)
            if cycle.status is Status.RUNNING:
                in_vain[cloud] = 0
                heapq.heappush(events, (cycle.arrived, cloud, place))
                return
            in_vain[cloud] += 1
            if in_vain[cloud] < MOST_ATTEMPTS:
                heapq.heappush(events, (site.next_up(cycle.ended), cloud, _BACK))

        for number in range(1, steps + 1):
            opened_at = ready
            for cloud in idle:
                begin(cloud, ready)
            idle, clouds = [], set[int]()
            arrived, early = early, []
            while len(clouds) < self.size:
                if not arrived and (not events or events[0][0] == math.inf):
                    raise UserError(
                        f"step {number}: only {len(clouds)} clouds are left to send and the buffer "
                        f"holds {self.size} messages; lower it, or mend their availability"
                    )
                now, cloud, place = arrived.pop(0) if arrived else heapq.heappop(events)
                if place == _BACK:
                    begin(cloud, now)
                elif cloud in clouds:
                    early.append((now, cloud, place))
                else:
                    clouds.add(cloud)
                    log.landed(place, number)
                    if begun[cloud] < version:
                        begin(cloud, now)
                    else:
                        idle.append(cloud)
            early.extend(arrived)
            closed = max(now, ready)
            ready, version = opened(sites, closed, opening, number, log), number
            log.step(Step(number, opened_at, closed, ready))
        return log.timeline(sites, opening)


_BACK = -1
