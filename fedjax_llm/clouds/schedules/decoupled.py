"""Decoupled: nobody waits for anybody; a quorum of fragments makes a step."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedjax_llm.clouds.schedules.deadline import check_quorum
from fedjax_llm.clouds.schedules.schedule import (
    MOST_ATTEMPTS,
    Present,
    Schedule,
    failed,
    opened,
)
from fedjax_llm.clouds.schedules.streaming import check_fragments
from fedjax_llm.clouds.site import Opening, Site
from fedjax_llm.clouds.timeline import Broadcast, Cycle, Log, Status, Step, Timeline
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Decoupled(Schedule):
    """Decoupled DiLoCo: clouds train without a pause and never wait for a failed or slow one.

    Each cloud trains its replica in cycles of its local steps. At the end of one it sends the
    fragment of the open step, if its link is free and it has something new to say of it (its last
    message of that fragment has come back to it), and trains on. A
    step closes when `quorum` messages are there, plus a grace: a fixed time, or, adaptive, until
    the first of those who have sent is through with its next cycle, so that nobody's work waits. A
    message counts by the local steps in it, up to twice the median of those that have landed and
    not below half of it. A cloud that went down starts afresh.

    The step that takes a message is known when it is sent, as for `FedBuff`.

    Attributes:
        quorum: fewest messages of a step.
        fragments: P, in how many parts the layers travel.
        mixing: what the replica keeps of itself where a fragment comes back.
        grace: seconds beyond the quorum; None is adaptive.
    """

    quorum: int = 1
    fragments: int = 1
    mixing: float = 0.0
    grace: float | None = None

    name = "decoupled"
    source = "arXiv 2604.21428"
    summary = "clouds never wait: a quorum of fragments and a grace window make a step"
    waits = False
    replicas = True

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        check_fragments(self.fragments, self.mixing)
        if self.quorum < 1:
            raise UserError(f"quorum must be at least 1 cloud, got {self.quorum}")
        if self.grace is not None and not 0 <= self.grace < math.inf:
            raise UserError(f"grace must be zero or more and finite seconds, got {self.grace}")

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
        assert present is None
        self.check(len(sites))
        run = _Run(self, sites, opening)
        for site in sites:
            run.restart(site, 0.0)
        while run.number <= steps:
            run.next_event()
        return run.log.timeline(sites, opening)


# Events of one moment, in the order in which they are taken.
_HERE, _CLOSE, _TRAINED, _BACK = range(4)


@dataclass(slots=True)
class _Learner:
    """What the simulation keeps of a cloud."""

    link: float = 0.0  # when its uplink is free
    downlink: float = 0.0
    versions: list[tuple[float, int]] = field(default_factory=list)  # when it has received which
    sent_for: int = 0  # the last step it has sent for
    held: int = 0  # local steps since its last message
    version: int = 0  # of the cycle that it trains
    in_vain: int = 0  # failures since a message of it arrived
    landed: dict[int, int] = field(default_factory=dict)  # fragment -> step of its last message
    down: float = -math.inf  # its next failure, as far as that has been asked for


@dataclass(slots=True)
class _Run:
    """One simulation."""

    schedule: Decoupled
    sites: Sequence[Site]
    opening: Opening
    log: Log = field(default_factory=Log)
    events: list[tuple[float, int, int, int]] = field(default_factory=list)
    ready: list[float] = field(default_factory=lambda: [0.0])
    here: dict[int, int] = field(default_factory=dict)  # cloud -> place of its message
    # place of a message under way -> version of its cycle, local steps in it
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)
    number: int = 1  # the step that is open
    since_close: int = 0  # events since the step before closed
    learners: list[_Learner] = field(init=False)

    def __post_init__(self) -> None:
        self.learners = [_Learner() for _ in self.sites]

    def push(self, when: float, kind: int, cloud: int, place: int = -1) -> None:
        """Adds an event, unless it never happens."""
        if when < math.inf:
            heapq.heappush(self.events, (when, kind, cloud, place))

    def next_event(self) -> None:
        """Takes the next event."""
        self.since_close += 1
        most = MOST_ATTEMPTS * (len(self.sites) + MOST_ATTEMPTS)
        if not self.events or self.since_close > most:
            raise UserError(
                f"step {self.number}: only {len(self.here)} clouds are left to send and the quorum "
                f"is {self.schedule.quorum}; lower it, or mend their availability"
            )
        now, kind, cloud, place = heapq.heappop(self.events)
        if kind == _TRAINED:
            self.trained(self.sites[cloud], now, place)
        elif kind == _HERE:
            self.arrived(cloud, now, place)
        elif kind == _BACK:
            self.restart(self.sites[cloud], now)
        elif place == self.number:
            self.close(now)

    def next_failure(self, site: Site, own: _Learner, now: float) -> float:
        """The next failure of a cloud that is up now; until then it is not asked for again."""
        if own.down <= now:
            own.down = site.next_failure(now)
        return own.down

    def restart(self, site: Site, now: float) -> None:
        """A cloud without a replica takes the newest global model and begins."""
        start = site.next_up(now)
        if start > now:
            self.push(start, _BACK, site.place)
            return
        version = self.number - 1
        while self.ready[version] > now:
            version -= 1
        own = self.learners[site.place]
        own.held, own.link, own.versions = 0, now, [(now, version)]
        own.downlink = received = site.receive_whole(now)
        self.begin(site, now, received, version, True)

    def begin(self, site: Site, start: float, received: float, version: int, fresh: bool) -> None:
        """A cycle begins; it ends trained or with a failure."""
        steps = site.local_steps
        own = self.learners[site.place]
        trained = site.train(received, steps)
        down = self.next_failure(site, own, start)
        if down <= trained:
            self.log.add(failed(site.place, version, steps, fresh, start, received, trained, down))
            own.in_vain += 1
            if own.in_vain < MOST_ATTEMPTS:
                self.push(site.next_up(down), _BACK, site.place)
            return
        own.held, own.version = own.held + steps, version
        cycle = Cycle(
            site.place, version, steps, fresh, start, received, trained, math.nan, trained,
            Status.LOCAL, 0, own.held,
        )  # fmt: skip
        heapq.heappush(self.events, (trained, _TRAINED, site.place, self.log.add(cycle)))

    def trained(self, site: Site, now: float, place: int) -> None:
        """A cycle's steps are done: its fragment is sent if it can be, and the next one begins."""
        own, here, schedule = self.learners[site.place], self.here, self.schedule
        if schedule.grace is None and site.place in here and len(here) >= schedule.quorum:
            # Adaptive grace ends where it would cost somebody a message.
            self.close(now)
        if own.link <= now and own.sent_for < self.number and self.news(own):
            own.link = arrived = site.send(now, self.number)
            # What is still on its way as the cloud goes down is lost with the rest.
            if self.next_failure(site, own, now) > arrived:
                own.sent_for, held, own.held = self.number, own.held, 0
                self.log.sent(place, arrived)
                self.sent[place] = own.version, held
                self.push(arrived, _HERE, site.place, place)
        # They arrive in their order, since a downlink carries one after the other.
        versions = own.versions
        while len(versions) > 1 and versions[1][0] <= now:
            del versions[0]
        self.begin(site, now, now, versions[0][1], False)

    def news(self, own: _Learner, version: int | None = None) -> bool:
        """Whether a message for the open step says what no message has said before.

        It is the distance of the replica from the version that its cycle began with: as long as
        that does not hold the cloud's last message of the fragment, it would say it again.
        """
        last = own.landed.get(self.number % self.schedule.fragments, 0)
        return last <= (own.version if version is None else version)

    def arrived(self, cloud: int, now: float, place: int) -> None:
        """A message is there: for the step that is open now."""
        if now < self.ready[-1]:
            # The sum before is still being opened; the next one takes messages after that.
            self.push(self.ready[-1], _HERE, cloud, place)
            return
        own = self.learners[cloud]
        own.in_vain = 0
        version, held = self.sent.pop(place)
        if not self.news(own, version):
            # It was on its way so long that it came for another fragment's turn.
            own.held += held
            self.log.kept(place)
            return
        self.here[cloud] = place
        own.sent_for = max(own.sent_for, self.number)
        if len(self.here) == len(self.sites):
            self.close(now)
        elif len(self.here) == self.schedule.quorum and self.schedule.grace is not None:
            self.push(now + self.schedule.grace, _CLOSE, -1, self.number)

    def close(self, now: float) -> None:
        """The open step takes what is there, and its fragment goes out to all that are up."""
        number = self.number
        for cloud, place in self.here.items():
            self.log.landed(place, number)
            self.learners[cloud].landed[number % self.schedule.fragments] = number
        ready = opened(self.sites, max(now, self.ready[-1]), self.opening, number, self.log)
        self.log.step(Step(number, self.ready[-1], now, ready))
        self.ready.append(ready)
        self.number += 1
        self.since_close = 0
        self.here = {}
        starts, ends = ([math.nan] * len(self.sites) for _ in range(2))
        for site in self.sites:
            own = self.learners[site.place]
            if ready < own.down or site.next_up(ready) == ready:
                starts[site.place] = max(ready, own.downlink)
                own.downlink = ends[site.place] = site.receive(starts[site.place], number)
                own.versions.append((own.downlink, number))
        self.log.broadcast(Broadcast(number, starts, ends))
