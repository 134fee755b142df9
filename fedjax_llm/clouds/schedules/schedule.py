"""What every schedule is: an event simulation from sites to a timeline, and what it asks of a run.

No schedule knows what is trained. It decides when the server waits for whom, and what a cloud does
meanwhile.
"""

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Answer, Cycle, Log, Status, Timeline
from fedjax_llm.errors import UserError

# A cloud that loses so many passes one after the other will not finish one.
MOST_ATTEMPTS = 1000

Present = Callable[[int], Sequence[bool]]


@dataclass(frozen=True)
class Schedule(ABC):
    """When the server waits for whom.

    Class attributes:
        name: in the run file.
        source: the paper.
        summary: one line.
        waits: a server step takes messages of the version before it alone, all of one wave.
        replicas: clouds train on from what they have instead of starting from the global model.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]
    waits: ClassVar[bool] = True
    replicas: ClassVar[bool] = False

    @property
    def timely(self) -> bool:
        """Whether every cloud begins with the version of the step that takes its message."""
        return self.waits and not self.replicas

    def check(self, clouds: int) -> None:
        """Raises UserError where the settings do not fit so many clouds."""
        del clouds

    @abstractmethod
    def simulate(
        self,
        sites: Sequence[Site],
        steps: int,
        opening: Opening = Opening(),
        present: Present | None = None,
    ) -> Timeline:
        """The timeline of so many server steps.

        Args:
            sites: the clouds, made for this call: a site counts its transfers.
            steps: server steps.
            opening: of each sum.
            present: which clouds take part in a step, by its number; all if None. Schedules that
                do not wait take None only.

        Raises:
            UserError: settings that do not fit the clouds, or a step that is never done.
        """

    def staleness_weight(self, behind: int) -> float:
        """What a message counts whose version is so many steps older than the step's; public."""
        del behind
        return 1.0


def one_pass(site: Site, start: float, step: int) -> Cycle:
    """One cycle from a broadcast on: RUNNING until its message arrives, or FAILED before that."""
    steps = site.local_steps
    received = site.receive(start, step)
    trained = site.train(received, steps)
    arrived = site.send(trained, step)
    down = site.next_failure(start)
    if down <= arrived:
        return failed(site.place, step - 1, steps, True, start, received, trained, down)
    return Cycle(
        site.place, step - 1, steps, True, start, received, trained, arrived, arrived,
        Status.RUNNING, 0, steps,
    )  # fmt: skip


def whole_pass(site: Site, start: float, step: int, until: float = math.inf) -> list[Cycle]:
    """The cycles from a broadcast to an arrival: those that failed, then one that is RUNNING.

    Args:
        site: the cloud.
        start: of the broadcast.
        step: for which it trains; its version is the one before.
        until: passes that would begin later are not begun; then the last one may have failed, or
            there is none. The same if the cloud never comes back, or fails again and again.
    """
    found: list[Cycle] = []
    for _ in range(MOST_ATTEMPTS):
        start = site.next_up(start)
        if start > until or start == math.inf:
            return found
        found.append(one_pass(site, start, step))
        if found[-1].status is Status.RUNNING:
            return found
        start = found[-1].ended
    return found


def gone(site: Site, step: int) -> UserError:
    """The error of a step that waits for a cloud that never gets through."""
    return UserError(
        f"step {step} waits for cloud {site.name!r}, which never gets through: it does not come "
        "back, or fails faster than it trains; mend its availability, take fewer local steps, or "
        "choose a schedule with a quorum"
    )


def failed(
    place: int,
    version: int,
    steps: int,
    fresh: bool,
    start: float,
    received: float,
    trained: float,
    down: float,
) -> Cycle:
    """A cycle that a cloud lost as it went down."""
    return Cycle(
        place, version, steps, fresh, start,
        received if received <= down else math.nan,
        trained if trained <= down else math.nan,
        math.nan, down, Status.FAILED,
    )  # fmt: skip


def opened(sites: Sequence[Site], closed: float, opening: Opening, step: int, log: Log) -> float:
    """When the sum of a step is open: the fastest holders have answered, which the log is told.

    Raises:
        UserError: too few clouds ever come back to open it.
    """
    if not opening.holders:
        return closed
    start = closed
    for _ in range(MOST_ATTEMPTS):
        asked = [(site.answer(start, opening.size), site.place) for site in sites]
        answers = heapq.nsmallest(opening.holders, asked)
        if len(answers) == opening.holders and answers[-1][0] < math.inf:
            for end, cloud in answers:
                log.answer(Answer(cloud, step, start, end))
            return answers[-1][0]
        # Too few are up for long enough: the server asks again when the next one is back.
        silent = [site for site, (end, _) in zip(sites, asked, strict=True) if end == math.inf]
        again = (site.next_up(site.next_failure(start)) for site in silent)
        start = min(again, default=math.inf)
        if start == math.inf:
            break
    raise UserError(
        f"step {step}: {opening.holders} clouds have to be up at once to open its sum, and that "
        "does not happen; lower the threshold, or raise availability"
    )
