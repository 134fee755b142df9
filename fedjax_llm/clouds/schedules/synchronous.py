"""Synchronous: the server waits for every cloud of the round."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds.schedules.schedule import Present, Schedule, gone, opened, whole_pass
from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Log, Status, Step, Timeline


@dataclass(frozen=True)
class Synchronous(Schedule):
    """Every cloud of a round lands in it; one that fails starts again, and all wait for it."""

    name = "synchronous"
    source = "arXiv 1602.05629, algorithm 1"
    summary = "the server waits for every cloud"

    def simulate(
        self,
        sites: Sequence[Site],
        steps: int,
        opening: Opening = Opening(),
        present: Present | None = None,
    ) -> Timeline:
        """See `Schedule.simulate`."""
        log, now = Log(), 0.0
        for number in range(1, steps + 1):
            here = sites if present is None else _chosen(sites, present(number))
            closed = now
            for site in here:
                passes = whole_pass(site, now, number)
                if not passes or passes[-1].status is not Status.RUNNING:
                    raise gone(site, number)
                *failed, cycle = passes
                for lost in failed:
                    log.add(lost)
                log.landed(log.add(cycle), number)
                closed = max(closed, cycle.arrived)
            # A round that too few can open is refused when it comes; its time does not matter.
            ready = closed
            if len(here) >= opening.holders:
                ready = opened(here, closed, opening, number, log)
            log.step(Step(number, now, closed, ready))
            now = ready
        return log.timeline(sites, opening)


def _chosen(sites: Sequence[Site], present: Sequence[bool]) -> list[Site]:
    return [site for site, here in zip(sites, present, strict=True) if here]
