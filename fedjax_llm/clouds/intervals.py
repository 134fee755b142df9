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

import numpy as np

from fedjax_llm.clouds.site import Presence
from fedjax_llm.clouds.timeline import Timeline
from fedjax_llm.clouds.transfers import Transfers, lost_cycles, transfers


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
    trained_C = _training(timeline)
    found = []
    for cloud in range(len(timeline.names)) if clouds is None else clouds:
        down = [Interval(*own, Activity.DOWN) for own in _down(presences[cloud], timeline.seconds)]
        found.append(
            Lanes(
                _painted([*down, *trained_C[cloud]], timeline.seconds),
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


def _training(timeline: Timeline) -> list[list[Interval]]:
    """From the reception to the end of each cycle's local steps, by cloud."""
    table_M, found = timeline.table_M, [list[Interval]() for _ in timeline.names]
    end_M = np.where(np.isnan(table_M["trained"]), table_M["ended"], table_M["trained"])
    columns_M = (table_M["cloud"], table_M["received"], end_M, lost_cycles(timeline))
    for cloud, start, end, lost in zip(*(c.tolist() for c in columns_M), strict=True):
        if not math.isnan(start):
            found[cloud].append(Interval(start, end, Activity.LOST if lost else Activity.TRAINS))
    return found


def _network(own: Transfers) -> Iterator[Interval]:
    columns = (own.start_N, own.end_N, own.up_N, own.lost_N, own.opens_N)
    for start, end, up, lost, opens in zip(*(c.tolist() for c in columns), strict=True):
        activity = Activity.SENDS if up else Activity.RECEIVES
        if lost or opens:
            activity = Activity.LOST if lost else Activity.OPENS
        yield Interval(start, end, activity)


_ACTIVITIES = tuple(Activity)
_PLACES = {activity: place for place, activity in enumerate(_ACTIVITIES)}


def _painted(spans: Sequence[Interval], until: float) -> tuple[Interval, ...]:
    """Spans that may overlap as a lane from 0 to `until`; nothing is waiting."""
    changes = []
    for start, end, activity in spans:
        if start < min(end, until):
            place = _PLACES[activity]
            changes += [(start, 1, place), (min(end, until), -1, place)]
    # Waiting lasts from the beginning to the end, at which nothing changes.
    changes = [(0.0, 1, _PLACES[Activity.WAITS]), *sorted(changes), (until, 0, 0)]
    active = [0] * len(_ACTIVITIES)
    found: list[Interval] = []
    since, shown = 0.0, -1  # what is shown now, and since when
    for (start, change, place), (end, _, _) in pairwise(changes):
        active[place] += change
        if start == end:
            continue
        first = next(own for own, count in enumerate(active) if count)
        if first != shown:
            if shown >= 0:
                found.append(Interval(since, start, _ACTIVITIES[shown]))
            since, shown = start, first
    if shown >= 0:
        found.append(Interval(since, until, _ACTIVITIES[shown]))
    return tuple(found)
