"""What each cloud does when: a timeline as intervals without gaps on two lanes, and its goodput.

A cloud computes and uses its network at the same time, so each cloud has a lane for either:

| lane | what is on it |
|---|---|
| compute | TRAINS, LOST, WAITS, DOWN |
| network | RECEIVES, SENDS, OPENS, LOST, WAITS, DOWN |

LOST is the work and the transfers of cycles that came to nothing (`transfers.lost_cycles`). Where
several hold at once on the network lane, the first of DOWN, SENDS, RECEIVES, OPENS, LOST is shown.
"""

import enum
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from fedjax_llm.clouds.site import Presence
from fedjax_llm.clouds.timeline import Timeline
from fedjax_llm.clouds.transfers import Bools, Transfers, lost_cycles, transfers


class Activity(enum.StrEnum):
    """What a cloud does on a lane; the first of several that hold at once is shown."""

    DOWN = "down"
    TRAINS = "trains"
    SENDS = "sends"
    RECEIVES = "receives"
    OPENS = "opens"
    LOST = "lost"
    WAITS = "waits"


class Interval(NamedTuple):
    """From when to when, in virtual seconds, a cloud does something."""

    start: float
    end: float
    activity: Activity


class Lanes(NamedTuple):
    """One cloud from second 0 to the end of the run, each lane without gaps and overlaps."""

    compute: tuple[Interval, ...]
    network: tuple[Interval, ...]


def lanes(
    timeline: Timeline, presences: Sequence[Presence | None], clouds: Sequence[int] | None = None
) -> list[Lanes]:
    """The lanes of clouds.

    Args:
        timeline: of the run.
        presences: when each cloud is up, as the simulation had it; always if None.
        clouds: places of those that are wanted, in order; all if None.
    """
    moved = transfers(timeline, presences).by_cloud(len(timeline.names))
    lost_M = lost_cycles(timeline)
    by_cloud: dict[int, list[int]] = {}
    for place, cloud in enumerate(timeline.table_M["cloud"].tolist()):
        by_cloud.setdefault(cloud, []).append(place)
    found = []
    for cloud in range(len(timeline.names)) if clouds is None else clouds:
        down = [Interval(*own, Activity.DOWN) for own in _down(presences[cloud], timeline.seconds)]
        trained = _training(timeline, by_cloud.get(cloud, []), lost_M)
        found.append(
            Lanes(
                _painted([*down, *trained], timeline.seconds),
                _painted([*down, *_network(moved[cloud])], timeline.seconds),
            )
        )
    return found


def seconds_of(lane: Sequence[Interval]) -> dict[Activity, float]:
    """Seconds of each activity on a lane."""
    found = dict.fromkeys(Activity, 0.0)
    for start, end, activity in lane:
        found[activity] += end - start
    return found


class Goodput(NamedTuple):
    """Training whose result entered the model, as a part of time.

    Attributes:
        of_run: over clouds x virtual duration; downtime counts as lost.
        while_up: over the seconds for which the clouds were up.
    """

    of_run: float
    while_up: float


def goodput(timeline: Timeline, presences: Sequence[Presence | None]) -> Goodput:
    """The goodput of a run; 0 for one without a step.

    Args:
        timeline: of the run.
        presences: when each cloud is up; always if None.
    """
    counted_M = timeline.table_M[timeline.counted]
    useful = float((counted_M["trained"] - counted_M["received"]).sum())
    whole = timeline.seconds * len(timeline.names)
    down = sum(end - start for own in presences for start, end in _down(own, timeline.seconds))
    if not whole:
        return Goodput(0.0, 0.0)
    return Goodput(useful / whole, useful / (whole - down) if whole > down else 0.0)


def _down(presence: Presence | None, until: float) -> Iterator[tuple[float, float]]:
    """The spans for which a cloud is down."""
    start = math.inf if presence is None else presence.next_failure(0.0)
    while presence is not None and start < until:
        end = presence.next_up(start)
        yield start, min(end, until)
        start = presence.next_failure(end) if end < until else math.inf


def _training(timeline: Timeline, places: Sequence[int], lost_M: Bools) -> Iterator[Interval]:
    for place in places:
        cycle = timeline.cycle(place)
        end = cycle.ended if math.isnan(cycle.trained) else cycle.trained
        if not math.isnan(cycle.received):
            yield Interval(cycle.received, end, Activity.LOST if lost_M[place] else Activity.TRAINS)


def _network(own: Transfers) -> Iterator[Interval]:
    columns = (own.start_N, own.end_N, own.up_N, own.lost_N, own.opens_N)
    for start, end, up, lost, opens in zip(*(c.tolist() for c in columns), strict=True):
        activity = Activity.SENDS if up else Activity.RECEIVES
        if lost or opens:
            activity = Activity.LOST if lost else Activity.OPENS
        yield Interval(start, end, activity)


_ORDER = {activity: place for place, activity in enumerate(Activity)}


def _painted(spans: Sequence[Interval], until: float) -> tuple[Interval, ...]:
    """Spans that may overlap as a lane from 0 to `until`; nothing is waiting."""
    changes = []
    for start, end, activity in spans:
        if start < min(end, until):
            changes += [(start, 1, activity), (min(end, until), -1, activity)]
    changes.sort(key=lambda change: change[0])
    times = [0.0, *(time for time, _, _ in changes), until]
    active = dict.fromkeys(Activity, 0)
    active[Activity.WAITS] = 1
    found: list[Interval] = []
    for place, (start, end) in enumerate(pairwise(times)):
        if place:
            _, change, activity = changes[place - 1]
            active[activity] += change
        if start == end:
            continue
        shown = min((own for own, count in active.items() if count), key=_ORDER.__getitem__)
        if found and found[-1].activity is shown:
            found[-1] = Interval(found[-1].start, end, shown)
        else:
            found.append(Interval(start, end, shown))
    return tuple(found)
