"""Availability: every kind keeps one contract; random failures have the law that they promise."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds import Always, Availability, Failures, Trace, trace_from_csv
from fedjax_llm.errors import UserError


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    gaps = draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
    up = draw(st.lists(st.booleans(), min_size=len(gaps), max_size=len(gaps)).filter(any))
    seconds = [0.0, *np.cumsum(gaps[:-1]).tolist()]
    period = seconds[-1] + gaps[-1] if draw(st.booleans()) else None
    return Trace(tuple(seconds), tuple(up), period)


failures = st.builds(
    Failures, st.floats(50.0, 1e4), st.floats(50.0, 1e4), st.integers(0, 9), st.just("eu")
)
KINDS = st.one_of(st.just(Always()), traces(), failures)


def is_up(availability: Availability, time: float) -> bool:
    return availability.next_up(time) == time


@given(KINDS, st.floats(0, 1e5))
def test_the_next_moments_are_the_next_moments(availability, time):
    up, down = availability.next_up(time), availability.next_failure(time)
    assert min(up, down) == time, "at any moment it is up or down"
    assert max(up, down) > time
    if math.isfinite(up):
        assert is_up(availability, up) and availability.next_up(up) == up
        assert availability.up_seconds(time, up) == pytest.approx(0, abs=1e-6)
    if math.isfinite(down):
        assert not is_up(availability, down) and availability.next_failure(down) == down
        assert availability.up_seconds(time, down) == pytest.approx(down - time, abs=1e-6)


@given(KINDS, st.lists(st.floats(0, 1e4), min_size=3, max_size=3).map(sorted))
def test_up_seconds_add_up_and_are_at_most_all(availability, times):
    a, b, c = times
    whole = availability.up_seconds(a, c)
    parts = availability.up_seconds(a, b) + availability.up_seconds(b, c)
    assert whole == pytest.approx(parts, abs=1e-6)
    assert -1e-9 <= whole <= c - a + 1e-9
    assert availability.up_seconds(c, a) == 0


@given(traces(), st.floats(0, 1e4))
def test_a_trace_says_what_its_line_says(trace, time):
    offset = time if trace.period_s is None else math.fmod(time, trace.period_s)
    line = max(k for k, second in enumerate(trace.seconds) if second <= offset)
    assert is_up(trace, time) == trace.up[line]


def test_a_trace_by_hand():
    trace = Trace((0.0, 10.0, 12.0), (True, False, True))
    assert trace.next_failure(3.0) == 10.0 and trace.next_up(10.0) == 12.0
    assert trace.next_failure(12.0) == math.inf and trace.fraction == 1.0
    assert trace.up_seconds(5.0, 20.0) == 13.0
    weekly = Trace((0.0, 10.0), (False, True), 30.0)
    assert weekly.next_up(0.0) == 10.0 and weekly.next_failure(10.0) == 30.0
    assert weekly.next_up(95.0) == 100.0 and weekly.fraction == pytest.approx(2 / 3)
    over = Trace((0.0, 10.0), (True, False))
    assert over.next_up(10.0) == math.inf and over.fraction == 0.0
    assert Trace((0.0,), (True,), 7.0).next_failure(100.0) == math.inf


@pytest.mark.parametrize("period", [0.1, 1 / 3, 86400 * 1.1])
def test_waiting_for_a_repair_goes_on_however_long_a_periodic_trace_runs(period):
    trace = Trace((0.0, period / 3), (False, True), period)
    time = 0.0
    for _ in range(2000):
        up = trace.next_up(time)
        down = trace.next_failure(up)
        assert is_up(trace, up) and not is_up(trace, down) and time <= up < down
        time = down + 997 * period


@given(failures, st.lists(st.floats(0, 1e5), min_size=1, max_size=20), st.randoms())
def test_failures_do_not_depend_on_the_order_of_questions(availability, times, random):
    asked = [(t, availability.next_failure(t), availability.next_up(t)) for t in times]
    again = dataclasses.replace(availability)
    random.shuffle(asked)
    for time, failure, up in asked:
        assert again.next_up(time) == up and again.next_failure(time) == failure
    assert again == availability and hash(again) == hash(availability)


def test_failures_have_their_means_and_their_availability():
    clouds = [Failures(900.0, 100.0, 7, f"cloud-{k}") for k in range(400)]
    at_start = np.mean([is_up(cloud, 0.0) for cloud in clouds])
    later = np.mean([is_up(cloud, 12_345.0) for cloud in clouds])
    # Four standard errors of a share of 0.9 among 400.
    assert at_start == pytest.approx(0.9, abs=0.06) and later == pytest.approx(0.9, abs=0.06)
    share = np.mean([cloud.up_seconds(0.0, 1e5) for cloud in clouds]) / 1e5
    assert share == pytest.approx(0.9, abs=0.01) == clouds[0].fraction
    ups, downs, time = [], [], 0.0
    for _ in range(4000):
        up = clouds[0].next_up(time)
        down = clouds[0].next_failure(up)
        time = clouds[0].next_up(down)
        ups.append(down - up)
        downs.append(time - down)
    ups, downs = ups[1:], downs[1:]  # the first interval may have begun before 0
    assert np.mean(ups) == pytest.approx(900, rel=0.08)
    assert np.mean(downs) == pytest.approx(100, rel=0.08)
    # Of an exponential time the part above its mean is 1/e, and the deviation is the mean.
    assert np.mean(np.array(ups) > 900) == pytest.approx(1 / math.e, abs=0.04)
    assert np.std(downs) == pytest.approx(100, rel=0.1)


def test_seeds_and_clouds_fail_at_their_own_times():
    up = [
        Failures(900.0, 100.0, seed, cloud).up_seconds(0.0, 1e5)
        for seed in range(5)
        for cloud in ("a", "b")
    ]
    assert len(set(up)) == 10
    assert Failures(900.0, 100.0, 3, "a").up_seconds(0.0, 1e5) == up[6]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_means_that_are_none(bad):
    with pytest.raises(UserError, match="mtbf_s must be positive and finite, got"):
        Failures(bad, 1.0)
    with pytest.raises(UserError, match="mttr_s must be positive and finite, got"):
        Failures(1.0, bad)


def test_trace_files(tmp_path: Path):
    file = tmp_path / "up.csv"
    file.write_text("seconds,up\n0,1\n60,false\n90,TRUE\n")
    assert trace_from_csv(file, 100.0) == Trace((0.0, 60.0, 90.0), (True, False, True), 100.0)
    for text, message in (
        ("seconds,up\n0,1\n60,2\n", "up.csv:3: up must be 0 or 1, got '2'"),
        ("seconds,up\n0,1\n60,0\n30,1\n", "up.csv:4: seconds must rise, got 30 after 60"),
        ("seconds,up\n0,0\n60,0\n", "up.csv: the trace is down at all times; leave the cloud out"),
        ("seconds,mbps\n0,1\n", "up.csv:1: the first line must be seconds,up, got seconds,mbps"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            trace_from_csv(file)
    with pytest.raises(UserError, match="period_s must be finite and above the last time 60"):
        Trace((0.0, 60.0), (True, False), 60.0)
