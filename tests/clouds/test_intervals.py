"""Intervals: no gaps and no overlaps whatever the clouds do, and by hand what is on a lane."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings

from fedjax_llm.clouds.intervals import Activity, Interval, goodput, lanes, seconds_of
from fedjax_llm.clouds.schedules import Deadline, Decoupled, Schedule, Streaming, Synchronous
from fedjax_llm.clouds.site import Opening, Site, Size
from fedjax_llm.clouds.timeline import Status, Timeline

from .schedule_sites import DownTimes, site
from .test_schedules import ALL, SITES, made


def presences(sites: list[Site]) -> list[DownTimes | None]:
    return [own._presence for own in sites]  # what the sites were made with


def drawn_timeline(schedule: Schedule, drawn: list[tuple]) -> Timeline:
    return schedule.simulate(made(drawn), 10, Opening(2, Size(1, 1)))


def seconds_down(presence: DownTimes | None, until: float) -> float:
    spans = () if presence is None else presence.intervals
    return sum(max(min(last, until) - first, 0.0) for first, last in spans)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=SITES)
@settings(max_examples=25, deadline=None)
def test_lanes_have_no_gaps_and_no_overlaps(schedule: Schedule, drawn):
    timeline = drawn_timeline(schedule, drawn)
    up = presences(made(drawn))
    for own, presence in zip(lanes(timeline, up), up, strict=True):
        for lane in own:
            assert lane[0].start == 0 and lane[-1].end == timeline.seconds
            assert all(a.end == b.start and a.activity != b.activity for a, b in pairwise(lane))
            assert all(a.start < a.end for a in lane)
            down = seconds_of(lane)[Activity.DOWN]
            assert down == pytest.approx(seconds_down(presence, timeline.seconds))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=SITES)
@settings(max_examples=25, deadline=None)
def test_lanes_hold_what_the_cycles_say(schedule: Schedule, drawn):
    timeline = drawn_timeline(schedule, drawn)
    up = presences(made(drawn))
    found = lanes(timeline, up)
    for cloud, own in enumerate(found):
        places = {p for p, c in enumerate(timeline.cycles) if c.cloud == cloud}
        mine = [timeline.cycle(p) for p in places]
        counted = [timeline.cycle(p) for p in places & set(timeline.counted)]
        useful = sum(c.trained - c.received for c in counted)
        # What is under way at the end trains as well.
        others = [timeline.cycle(p) for p in places - set(timeline.counted)]
        more = sum(
            min(np.fmin(c.trained, c.ended), timeline.seconds) - c.received
            for c in others
            if (c.status in (Status.RUNNING, Status.LOCAL) or c.ended > timeline.seconds)
            and c.received < timeline.seconds
        )
        trained = seconds_of(own.compute)[Activity.TRAINS]
        assert useful - 1e-9 <= trained <= useful + more + 1e-9
        for cycle in mine:
            if cycle.status is Status.LANDED:
                assert shown(own.compute, cycle.received, cycle.trained) == {Activity.TRAINS}
                assert Activity.SENDS in shown(own.network, cycle.trained, cycle.arrived)
            elif (
                cycle.status in (Status.FAILED, Status.LATE)
                and cycle.received < cycle.ended <= timeline.seconds
            ):
                end = cycle.ended if math.isnan(cycle.trained) else cycle.trained
                assert shown(own.compute, cycle.received, end) <= {Activity.LOST}


def shown(lane: tuple[Interval, ...], start: float, end: float) -> set[Activity]:
    return {own.activity for own in lane if own.start < end and start < own.end}


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=SITES)
@settings(max_examples=15, deadline=None)
def test_goodput_is_a_part_of_the_time_and_of_the_time_up(schedule: Schedule, drawn):
    timeline = drawn_timeline(schedule, drawn)
    up = presences(made(drawn))
    found = goodput(timeline, up)
    assert 0 < found.of_run <= found.while_up <= 1 + 1e-12
    if not any(up):
        assert found.of_run == found.while_up
    trained = sum(seconds_of(own.compute)[Activity.TRAINS] for own in lanes(timeline, up))
    assert found.of_run * timeline.seconds * len(up) <= trained + 1e-9


@pytest.mark.parametrize("schedule", [Synchronous(), Deadline(9.0, 2)], ids=repr)
@given(drawn=SITES)
@settings(max_examples=15, deadline=None)
def test_a_run_cut_short_is_the_shorter_run(schedule: Schedule, drawn):
    whole, short = (schedule.simulate(made(drawn), steps) for steps in (9, 4))
    up = presences(made(drawn))
    assert lanes(whole.until(4), up) == lanes(short, up)
    assert goodput(whole.until(4), up) == goodput(short, up)
    assert whole.until(9) is whole


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_what_is_under_way_at_the_end_has_not_landed(schedule: Schedule):
    drawn = [(1.0, 3.0, 10.0, 2, [20.0, 9.0]), (0.5, 1.0, 3.0, 1, []), (1.0, 10.0, 0.5, 3, [])]
    timeline = drawn_timeline(schedule, drawn)
    for steps in range(1, 10):
        cut = timeline.until(steps)
        assert cut.seconds == timeline.steps[steps - 1].ready
        for step in range(1, steps + 1):
            theirs = {c: timeline.cycle(p) for c, p in timeline.landing(step).items()}
            assert {c: cut.cycle(p) for c, p in cut.landing(step).items()} == theirs
        assert all(c.start < cut.seconds and c.lands <= steps for c in cut.cycles)
        assert all(lane[-1].end == cut.seconds for own in lanes(cut, [None] * 3) for lane in own)


def names(lane: tuple[Interval, ...]) -> list[tuple[float, float, str]]:
    return [(start, end, activity.value) for start, end, activity in lane]


def test_a_round_by_hand():
    sites = [site(0), site(1, down_times=[(2.5, 10.0)])]
    timeline = Synchronous().simulate(sites, 1, Opening(1, Size(1, 1)))
    first, second = lanes(timeline, presences(sites))
    # 1 second down, 2 of training, 4 up; cloud 1 starts again at 10 and is through at 17, and the
    # sum opens 5 seconds later.
    assert names(first.compute) == [(0, 1, "waits"), (1, 3, "trains"), (3, 22, "waits")]
    answered = {"opens"} & {activity for _, _, activity in names(first.network)}
    assert names(first.network)[:3] == [(0, 1, "receives"), (1, 3, "waits"), (3, 7, "sends")]
    assert names(second.compute) == [
        *[(0, 1, "waits"), (1, 2.5, "lost"), (2.5, 10, "down"), (10, 11, "waits")],
        *[(11, 13, "trains"), (13, 22, "waits")],
    ]
    assert names(second.network)[:3] == [(0, 1, "lost"), (1, 2.5, "waits"), (2.5, 10, "down")]
    opened = "opens" in {activity for _, _, activity in names(second.network)}
    assert bool(answered) != opened  # one of the two answers, for both are as fast
    assert goodput(timeline, presences(sites)) == ((2 + 2) / 44, (2 + 2) / (44 - 7.5))


def test_a_message_waits_for_its_link():
    # An exchange of 10 seconds every 3 seconds: the second message begins when the first is there.
    sites = [site(place, train=3.0, up=10.0) for place in range(2)]
    timeline = Streaming(2, overlap=True).simulate(sites, 2)
    network = names(lanes(timeline, [None, None])[0].network)
    assert [own for own in network if own[2] == "sends"] == [(4.0, 24.0, "sends")]


def test_local_work_that_a_failure_takes_is_lost():
    # Every cycle of 2 seconds ends in a message of 40, which the failure at 30 cuts off; cloud 0
    # makes the steps.
    sites = [site(0), site(1, up=40.0, down_times=[(30.0, 31.0)])]
    timeline = Decoupled(1).simulate(sites, 9)
    lost = seconds_of(lanes(timeline, presences(sites))[1].compute)[Activity.LOST]
    assert lost == pytest.approx(29.0)
