"""Streaming: the clouds exchange one fragment of the adapter after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds.schedules.schedule import (
    MOST_ATTEMPTS,
    Present,
    Schedule,
    failed,
    gone,
    opened,
)
from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Broadcast, Cycle, Log, Status, Step, Timeline
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Streaming(Schedule):
    """Streaming DiLoCo: in each round one fragment of the layers is averaged, in turn.

    Every cloud keeps a replica that it trains on; what comes back of a fragment is mixed into it.
    With `overlap` it does not wait for that: the exchange of a round goes on during the next
    round's local steps, and is mixed in after those.

    Attributes:
        fragments: P, in how many parts the layers travel; 1 is DiLoCo (arXiv 2311.08105).
        overlap: whether the clouds train during the exchange; takes two fragments or more.
        mixing: alpha, what the replica keeps of itself where a fragment comes back; 0 takes the
            global values as they are.
    """

    fragments: int = 1
    overlap: bool = False
    mixing: float = 0.0

    name = "streaming"
    source = "arXiv 2501.18512, section 2; with one fragment DiLoCo, arXiv 2311.08105"
    summary = "clouds keep replicas and exchange one fragment after the other, while they train"
    replicas = True

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        check_fragments(self.fragments, self.mixing)
        if self.overlap and self.fragments < 2:
            raise UserError(
                "overlap sends one fragment while others are trained, and there is 1; set "
                "fragments to 2 or more"
            )

    def simulate(
        self,
        sites: Sequence[Site],
        steps: int,
        opening: Opening = Opening(),
        present: Present | None = None,
    ) -> Timeline:
        """See `Schedule.simulate`."""
        assert present is None
        log = Log()
        free = [0.0] * len(sites)  # when each cloud may go on training
        link = [0.0] * len(sites)  # when each uplink is free
        ready, received = [0.0], [[site.receive_whole(0.0) for site in sites]]
        log.broadcast(Broadcast(0, [0.0] * len(sites), received[0]))
        for number in range(1, steps + 1):
            # With overlap the exchange of the last round is still under way.
            version = max(0, number - 1 - self.overlap)
            closed = 0.0
            for site in sites:
                start = max(free[site.place], received[version][site.place])
                # While it waits for the others its replica can be lost too.
                since = link[site.place] if number > 1 and not self.overlap else start
                cycle = _through(site, start, since, version, number, link, ready, log)
                log.add(cycle)
                free[site.place] = cycle.trained
                link[site.place] = cycle.arrived
                closed = max(closed, cycle.arrived)
            ready.append(opened(sites, max(closed, ready[-1]), opening, number, log))
            received.append([site.receive(ready[-1], number) for site in sites])
            log.broadcast(Broadcast(number, [ready[-1]] * len(sites), received[-1]))
            log.step(Step(number, ready[-2], closed, ready[-1]))
        return log.timeline(sites, opening)


def _through(
    site: Site,
    start: float,
    since: float,
    version: int,
    number: int,
    link: Sequence[float],
    ready: Sequence[float],
    log: Log,
) -> Cycle:
    """A cycle that lands in step `number`; after a failure afresh from the newest global model."""
    fresh, begin, steps = number == 1, start, site.local_steps
    lost = site.next_failure(since)
    if lost <= start:
        start = max(site.next_up(lost), ready[version])
        if start == math.inf:
            raise gone(site, number)
        fresh, begin = True, site.receive_whole(start)
    for _ in range(MOST_ATTEMPTS):
        trained = site.train(begin, steps)
        arrived = site.send(max(trained, link[site.place]), number)
        down = site.next_failure(start)
        if down > arrived:
            return Cycle(
                site.place, version, steps, fresh, start, begin, trained, arrived, arrived,
                Status.LANDED, number, steps,
            )  # fmt: skip
        log.add(failed(site.place, version, steps, fresh, start, begin, trained, down))
        start = site.next_up(down)
        if start == math.inf:
            break
        # Its replica is lost.
        version = max(v for v, at in enumerate(ready) if at <= start)
        fresh, begin = True, site.receive_whole(start)
    raise gone(site, number)


def check_fragments(fragments: int, mixing: float) -> None:
    """Raises UserError for a number of fragments or a mixing that cannot be."""
    if fragments < 1:
        raise UserError(f"fragments must be at least 1, got {fragments}")
    if not 0 <= mixing < 1:
        raise UserError(
            f"mixing must be in [0, 1), got {mixing}; at 1 a cloud would never hear of the others"
        )
