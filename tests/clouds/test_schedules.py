"""Schedules: times by hand, and what holds for every timeline whatever the clouds do."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.clouds.schedules import (
    SCHEDULES,
    Deadline,
    Decoupled,
    FedBuff,
    Schedule,
    Streaming,
    Synchronous,
)
from fedjax_llm.clouds.site import Opening, Site, Size
from fedjax_llm.clouds.timeline import Status, Timeline
from fedjax_llm.errors import UserError

from .schedule_sites import site


def ended(timeline: Timeline, cloud: int) -> list[tuple[str, int, float]]:
    """How each cycle of a cloud ended: status, step, when."""
    return [(c.status.name, c.lands, c.ended) for c in timeline.cycles if c.cloud == cloud]


def test_synchronous_rounds_wait_for_the_slowest():
    timeline = Synchronous().simulate([site(0), site(1, train=5.0, steps=2)], 2)
    assert [step.ready for step in timeline.steps] == [15.0, 30.0]
    assert ended(timeline, 0) == [("LANDED", 1, 7.0), ("LANDED", 2, 22.0)]
    assert timeline.waves(1)[0].keys() == timeline.landing(2).keys() == {0, 1}


def test_a_cloud_that_fails_is_waited_for_and_starts_again():
    timeline = Synchronous().simulate([site(0), site(1, down_times=[(2.5, 10.0)])], 1)
    assert ended(timeline, 1) == [("FAILED", 0, 2.5), ("LANDED", 1, 17.0)]
    assert timeline.seconds == 17.0


def test_a_sum_is_open_when_as_many_as_needed_have_answered():
    clouds = [site(0), site(1, up=5.0), site(2, up=9.0)]
    timeline = Synchronous().simulate(clouds, 1, Opening(2, Size(1, 1)))
    assert timeline.steps[0].closed == 12.0
    assert timeline.seconds == 12.0 + 1.0 + 5.0


@pytest.mark.parametrize(
    ("seconds", "grace", "quorum", "closed", "landed"),
    [
        (100.0, 0.0, 2, 30.0, 3),  # all are there early
        (10.0, 0.0, 2, 10.0, 2),  # a quorum at the deadline
        (6.0, 5.0, 2, 9.0, 2),  # a quorum within the grace
        (6.0, 30.0, 3, 30.0, 3),
    ],
)
def test_a_deadline_closes_a_round(seconds, grace, quorum, closed, landed):
    clouds = [site(0, up=2.0), site(1, up=6.0), site(2, up=27.0)]
    timeline = Deadline(seconds, quorum, grace).simulate(clouds, 1)
    assert timeline.steps[0].closed == closed
    assert len(timeline.landing(1)) == landed
    late = [c for c in timeline.cycles if c.status is Status.LATE]
    assert [c.ended for c in late] == [closed] * (3 - landed)


def test_a_round_without_a_quorum_is_tried_again():
    clouds = [site(0), site(1, down_times=[(0.0, 12.0)])]
    timeline = Deadline(8.0, 2, 2.0).simulate(clouds, 1)
    # Tried at 0; tried again at 10, when cloud 1 comes back at 12 and is through at 19.
    assert timeline.steps[0].attempts == 2
    assert timeline.seconds == 19.0
    assert ended(timeline, 0) == [("LATE", 0, 7.0), ("LANDED", 1, 17.0)]


def test_a_buffer_takes_who_comes_first_and_nobody_waits():
    clouds = [site(0, train=1.0), site(1, train=2.0), site(2, train=50.0)]
    timeline = FedBuff(2).simulate(clouds, 3)
    assert [sorted(timeline.landing(n)) for n in (1, 2, 3)] == [[0, 1], [0, 1], [0, 1]]
    timeline = FedBuff(2).simulate(clouds, 20)
    (late,) = [c for c in timeline.cycles if c.cloud == 2 and c.status is Status.LANDED][:1]
    assert (late.version, late.arrived) == (0, 55.0)
    assert late.lands == 1 + sum(step.closed < 55.0 for step in timeline.steps) > 5
    assert FedBuff(2).staleness_weight(3) == 0.5


def test_fragments_overlap_with_training():
    # An exchange of 1 + 4 seconds hides behind the 6 seconds of the next cycle.
    clouds = [site(0, train=6.0), site(1, train=6.0)]
    hidden = Streaming(3, overlap=True).simulate(clouds, 4)
    assert [step.closed for step in hidden.steps] == [11.0, 17.0, 23.0, 29.0]
    assert [c.version for c in hidden.cycles if c.cloud == 0] == [0, 0, 1, 2]
    shown = Streaming(3).simulate([site(0, train=6.0), site(1, train=6.0)], 4)
    assert shown.seconds == 1 + 4 * 6 + 4 * 4 + 3 * 1


def test_decoupled_clouds_train_without_a_pause_beside_a_failed_and_a_slow_one():
    clouds = [
        site(0),
        site(1),
        site(2, up=40.0),
        site(3, down_times=[(5.0, 30.0)]),
    ]
    timeline = Decoupled(2, 2).simulate(clouds, 80)
    own = [c for c in timeline.cycles if c.cloud == 0]
    assert all(a.trained == b.received for a, b in pairwise(own))
    # The slow one's message holds all that it has trained since the last.
    slow = [c for c in timeline.cycles if c.cloud == 2 and c.status is Status.LANDED]
    assert [c.held for c in slow[:2]] == [1, 20]
    assert [c.fresh for c in timeline.cycles if c.cloud == 3][:3] == [True, False, True]


FEW = st.sampled_from([0.5, 1.0, 3.0, 10.0])
SITES = st.lists(
    st.tuples(FEW, FEW, FEW, st.integers(1, 3), st.lists(st.floats(0.5, 40.0), max_size=6)),
    min_size=3,
    max_size=5,
)


def made(drawn: list[tuple]) -> list[Site]:
    """Sites of what hypothesis drew; the times of failures are gaps that alternate."""
    found = []
    for place, (down, train, up, steps, gaps) in enumerate(drawn):
        times = np.cumsum(gaps).tolist()
        intervals = list(zip(times[::2], times[1::2], strict=False))
        found.append(site(place, down=down, train=train, up=up, steps=steps, down_times=intervals))
    return found


ALL = [
    Synchronous(),
    Deadline(9.0, 2),
    Deadline(20.0, 2, 60.0),
    FedBuff(2),
    FedBuff(3),
    Streaming(1),
    Streaming(2, overlap=True, mixing=0.5),
    Decoupled(1, 2),
    Decoupled(2, 3),
    Decoupled(2, 2, grace=1.5),
]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=SITES)
@settings(max_examples=25, deadline=None)
def test_every_timeline_keeps_cause_before_effect(schedule: Schedule, drawn):
    steps = 12
    timeline = schedule.simulate(made(drawn), steps, Opening(2, Size(1, 1)))
    ready = [0.0, *(step.ready for step in timeline.steps)]
    assert [step.number for step in timeline.steps] == list(range(1, steps + 1))
    assert ready == sorted(ready)
    sites, by_cloud = made(drawn), {}
    for cycle in timeline.cycles:
        by_cloud.setdefault(cycle.cloud, []).append(cycle)
        assert cycle.start >= ready[cycle.version] or not cycle.fresh
        assert cycle.received >= ready[cycle.version] or math.isnan(cycle.received)
        if cycle.status is Status.LANDED:
            step = timeline.steps[cycle.lands - 1]
            assert cycle.version < cycle.lands
            assert cycle.start <= cycle.received <= cycle.trained <= cycle.arrived <= step.closed
            # Nothing that lands was made while its cloud was down.
            assert sites[cycle.cloud].next_failure(cycle.start) > cycle.arrived
        elif cycle.status is Status.FAILED:
            assert sites[cycle.cloud].next_up(cycle.ended) > cycle.ended
    for own in by_cloud.values():
        trainings = [(c.received, c.trained) for c in own if not math.isnan(c.trained)]
        assert all(a[1] <= b[0] for a, b in pairwise(trainings))
        sends = sorted((c.trained, c.arrived) for c in own if not math.isnan(c.arrived))
        if not isinstance(schedule, Streaming):  # its messages queue for the link
            assert all(a[1] <= b[0] for a, b in pairwise(sends))
    for step in timeline.steps:
        taken = timeline.landing(step.number)
        assert len(taken) >= getattr(schedule, "quorum", 1)
        last = max(timeline.cycle(place).arrived for place in taken.values())
        assert last <= step.closed <= step.ready


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=SITES)
@settings(max_examples=15, deadline=None)
def test_a_message_is_kept_until_its_step(schedule: Schedule, drawn):
    """Runs the timeline as a federation does: nothing is overwritten, nothing is missing."""
    timeline = schedule.simulate(made(drawn), 12)
    kept: dict[tuple[int, int], int] = {}
    landed = 0
    for step in range(1, 13):
        for wave in timeline.waves(step - 1):
            for cloud, place in wave.items():
                if timeline.cycle(place).status is Status.LANDED:
                    slot = cloud, timeline.slots[place]
                    assert slot not in kept
                    kept[slot] = place
        for cloud, place in timeline.landing(step).items():
            assert kept.pop((cloud, timeline.slots[place])) == place
            landed += 1
    assert not kept
    assert landed == sum(c.status is Status.LANDED for c in timeline.cycles)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_simulation_repeats(schedule: Schedule):
    clouds = [(1.0, 2.0, 4.0, 2, [7.0, 9.0]), (3.0, 1.0, 0.5, 1, []), (0.5, 3.0, 10.0, 3, [])]
    one, other = (schedule.simulate(made(clouds), 9) for _ in range(2))
    assert one.steps == other.steps
    assert one.table_M.tobytes() == other.table_M.tobytes()


class _Flickering:
    """Down in every odd second, for ever."""

    def next_failure(self, seconds: float) -> float:
        return seconds if math.floor(seconds) % 2 else math.floor(seconds) + 1.0

    def next_up(self, seconds: float) -> float:
        return math.floor(seconds) + 1.0 if math.floor(seconds) % 2 else seconds


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Deadline(5.0, 4).simulate([site(0)], 1), "quorum = 4 is more than the 1 clouds"),
        (lambda: FedBuff(2).simulate([site(0)], 1), "buffer = 2 is more than"),
        (lambda: Decoupled(2).simulate([site(0)], 1), "quorum = 2 is more than"),
        (lambda: Deadline(-1.0, 1), "deadline must be zero or more"),
        (lambda: Deadline(1.0, 0), "quorum must be at least 1"),
        (lambda: FedBuff(1, -1.0), "exponent must be zero or more"),
        (lambda: Streaming(1, overlap=True), "set fragments to 2"),
        (lambda: Streaming(2, mixing=1.0), r"mixing must be in \[0, 1\)"),
        (
            lambda: Synchronous().simulate([site(0, down_times=[(0.0, math.inf)])], 1),
            "never gets through",
        ),
        (
            lambda: FedBuff(1).simulate([site(0, down_times=[(0.0, math.inf)])], 1),
            "only 0 clouds are left",
        ),
        (
            lambda: Decoupled(1).simulate([site(0, down_times=[(0.0, math.inf)])], 1),
            "only 0 clouds are left",
        ),
        (
            lambda: Deadline(1.0, 1, 0.0).simulate([site(0)], 1),
            "raise the deadline",
        ),
        (
            lambda: Synchronous().simulate(
                [site(0, up=5.0), site(1, down_times=[(7.5, math.inf)])], 1, Opening(2, Size(1, 1))
            ),
            "2 clouds have to be up at once",
        ),
        # One cloud alone goes on training for ever, or every cycle of both fails.
        (
            lambda: Decoupled(2).simulate([site(0), site(1, down_times=[(0.0, math.inf)])], 1),
            "only 1 clouds are left",
        ),
        (lambda: Decoupled(1).simulate([site(0, presence=_Flickering())], 1), "only 0 clouds"),
        (lambda: FedBuff(1).simulate([site(0, presence=_Flickering())], 1), "only 0 clouds"),
        (
            lambda: Synchronous().simulate([site(0, presence=_Flickering())], 1),
            "never gets through",
        ),
    ],
)
def test_what_never_ends_or_cannot_be_is_one_clear_line(wrong, words):
    with pytest.raises(UserError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_every_schedule_has_a_name_and_a_source():
    assert set(SCHEDULES) == {"synchronous", "deadline", "buffered", "streaming", "decoupled"}
    assert all("arXiv" in schedule.source for schedule in SCHEDULES.values())


@pytest.mark.parametrize("fragments", [1, 2, 3])
@given(drawn=SITES)
@settings(max_examples=25, deadline=None)
def test_a_decoupled_message_says_nothing_twice(fragments: int, drawn):
    """Its cycle began with a version that holds the cloud's last message of that fragment."""
    timeline = Decoupled(1, fragments).simulate(made(drawn), 30)
    last: dict[tuple[int, int], int] = {}
    for cycle in sorted(timeline.cycles, key=lambda cycle: cycle.lands):
        if cycle.status is Status.LANDED:
            fragment = cycle.cloud, cycle.lands % fragments
            assert cycle.version >= last.get(fragment, 0)
            last[fragment] = cycle.lands
    for before, step in pairwise(timeline.steps):
        assert step.closed >= before.ready


def test_a_holder_that_goes_down_before_it_has_answered_has_not_answered():
    clouds = [site(0, down_times=[(7.2, 30.0)]), site(1, down_times=[(7.5, 20.0)])]
    timeline = Synchronous().simulate(clouds, 1, Opening(2, Size(1, 1)))
    # Closed at 7; both answer after 30, when the second is back.
    assert timeline.seconds == 30.0 + 5.0


def test_a_replica_that_is_lost_while_its_cloud_waits_is_lost():
    clouds = [site(0, up=90.0), site(1, down_times=[(20.0, 92.5)])]
    timeline = Streaming(1).simulate(clouds, 2)
    second = [c for c in timeline.cycles if c.cloud == 1][1]
    assert (second.version, second.fresh, second.lands) == (1, True, 2)
    # The version is ready at 93; it is received anew.
    assert second.received == 94.0
