"""Schedules against an exact walk over their pieces; traces that cannot be."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds.rates import Rate, rate_from_csv
from fedjax_llm.errors import UserError


@st.composite
def schedules(draw: st.DrawFn) -> Rate:
    gaps = draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
    rates = draw(
        st.lists(
            st.one_of(st.just(0.0), st.floats(1e-2, 1e4)),
            min_size=len(gaps),
            max_size=len(gaps),
        )
    )
    rates[-1] = rates[-1] or 1.0
    seconds = [0.0]
    for gap in gaps[:-1]:
        seconds.append(seconds[-1] + gap)
    period = seconds[-1] + gaps[-1] if draw(st.booleans()) else None
    return Rate(tuple(seconds), tuple(rates), period)


def walked(schedule: Rate, start: float, megabits: float) -> float:
    """The end of a transfer, piece by piece in exact arithmetic."""
    seconds = [Fraction(second) for second in schedule.seconds]
    rates = [Fraction(rate) for rate in schedule.mbps]
    now, left = Fraction(start), Fraction(megabits)
    period = None if schedule.period_s is None else Fraction(schedule.period_s)
    if period is not None:  # whole periods at once, or a slow link would walk for ever
        ends = [*seconds[1:], period]
        full = sum((e - s) * r for s, e, r in zip(seconds, ends, rates, strict=True))
        whole = max(left // full - 1, 0)
        now, left = now + whole * period, left - whole * full
    while left > 0:
        base = Fraction(0) if period is None else now // period * period
        piece = max(k for k, second in enumerate(seconds) if base + second <= now)
        last = piece == len(seconds) - 1
        end = base + period if last and period else None if last else base + seconds[piece + 1]
        room = math.inf if end is None else (end - now) * rates[piece]
        if room >= left:
            return float(now + left / rates[piece])
        assert end is not None
        now, left = end, left - room
    return float(now)


@given(schedules(), st.floats(0, 1e5), st.floats(1e-3, 1e6))
def test_finish_is_that_of_an_exact_walk(schedule, start, megabits):
    end = schedule.finish(start, megabits)
    assert end >= start
    # At the seam of two pieces around an outage, a rounding error of the start is the whole outage.
    slack = 1e-9 * max(megabits, 1.0)
    soonest = walked(schedule, max(start - 1e-9 * max(start, 1), 0), max(megabits - slack, 0))
    latest = walked(schedule, start + 1e-9 * max(start, 1), megabits + slack)
    assert soonest - 1e-6 <= end * (1 + 1e-9) + 1e-6 and end <= latest * (1 + 1e-9) + 1e-6


@given(schedules(), st.floats(0, 1e4), st.floats(1, 1e5))
def test_a_later_start_or_a_larger_transfer_never_ends_earlier(schedule, start, megabits):
    end = schedule.finish(start, megabits)
    assert schedule.finish(start, 2 * megabits) >= end
    assert schedule.finish(start + 1.0, megabits) >= end - 1e-6
    assert schedule.finish(start, 0.0) == start


def test_pieces_by_hand():
    office = Rate((0.0, 10.0, 20.0), (100.0, 0.0, 50.0))
    assert office.finish(0.0, 500.0) == 5.0
    assert office.finish(0.0, 1000.0) == 10.0, "the last bit leaves before the outage"
    assert office.finish(0.0, 1001.0) == pytest.approx(20.02)
    assert office.finish(12.0, 50.0) == 21.0
    assert office.finish(1e6, 50.0) == 1e6 + 1, "the last rate holds"
    assert [office.mbps_at(t) for t in (0, 9.99, 10, 19, 20, 1e9)] == [100, 100, 0, 0, 50, 50]
    daily = Rate((0.0, 1.0), (8.0, 2.0), 4.0)  # 14 megabits in 4 seconds
    assert daily.mean_mbps == 3.5
    assert daily.finish(0.0, 14.0) == 4.0 and daily.finish(0.0, 14.0 * 10**6) == 4.0 * 10**6
    assert daily.finish(4.0 * 10**6 + 3.0, 10.0) == 4.0 * 10**6 + 5.0
    night = Rate((0.0, 1.0), (8.0, 0.0), 4.0)
    assert night.finish(0.0, 8.0) == 1.0 and night.finish(0.0, 16.0) == 5.0


@pytest.mark.parametrize("period", [0.3, 86400.0, None])
def test_a_transfer_of_next_to_nothing_does_not_end_before_it_starts(period):
    schedule = Rate((0.0, 0.1), (3.0, 7.0), period)
    starts = [k * 0.00073 for k in range(5000)]
    assert all(schedule.finish(start, 1e-18) >= start for start in starts)


def test_limited_caps_each_piece_and_takes_a_share():
    schedule = Rate((0.0, 5.0), (100.0, 1.0), 10.0).limited(10.0, 0.5)
    assert schedule.mbps == (5.0, 0.5) and schedule.period_s == 10.0


@pytest.mark.parametrize(
    ("seconds", "mbps", "period", "message"),
    [
        ((), (), None, "each time needs one value, got 0 times and 0 values"),
        ((0.0, 1.0), (1.0,), None, "each time needs one value, got 2 times and 1 values"),
        ((1.0,), (1.0,), None, "times must begin at second 0, got 1"),
        ((0.0, 3.0, 2.0), (1.0, 1.0, 1.0), None, "times must rise, got 2 after 3"),
        ((0.0, math.nan), (1.0, 1.0), None, "times must rise, got nan after 0"),
        ((0.0, 1.0), (1.0, -1.0), None, "mbps must be zero or more and finite, got -1 at second 1"),
        ((0.0,), (math.nan,), None, "mbps must be zero or more and finite, got nan at second 0"),
        ((0.0, 1.0), (0.0, 0.0), 2.0, "mbps is 0 at all times"),
        ((0.0, 1.0), (1.0, 0.0), None, "mbps is 0 from second 1 on.*give period_s"),
        ((0.0, 1.0), (1.0, 1.0), 1.0, "period_s must be finite and above the last time 1, got 1"),
        ((0.0,), (1.0,), math.inf, "period_s must be finite"),
    ],
)
def test_schedules_that_are_none(seconds, mbps, period, message):
    with pytest.raises(UserError, match=message):
        Rate(seconds, mbps, period)


def test_a_trace_file_is_its_schedule(tmp_path: Path):
    file = tmp_path / "up.csv"
    file.write_text("seconds, mbps\n0,100\n\n 28800 , 0\n57600,1e2\n")
    expected = Rate((0.0, 28800.0, 57600.0), (100.0, 0.0, 100.0), 86400.0)
    assert rate_from_csv(file, 86400.0) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seconds,mbps\n0,5\n10,5\n9,5\n", "up.csv:4: seconds must rise, got 9 after 10"),
        ("seconds,mbps\n0,5\n0,5\n", "up.csv:3: seconds must rise, got 0 after 0"),
        ("seconds,mbps\n5,5\n", "up.csv:2: seconds must begin at 0, got 5"),
        ("seconds,mbps\nnan,5\n", "up.csv:2: seconds must be a finite number, got 'nan'"),
        ("seconds,mbps\n0,nan\n", "up.csv:2: mbps must be zero or more .* got 'nan'"),
        ("seconds,mbps\n0,-1\n", "up.csv:2: mbps must be zero or more .* got '-1'"),
        ("seconds,mbps\n0,fast\n", "up.csv:2: mbps must be zero or more .* got 'fast'"),
        ("seconds,mbps\n0,1,2\n", "up.csv:2: a line must have two cells, got 3"),
        ("time,mbps\n0,1\n", "up.csv:1: the first line must be seconds,mbps, got time,mbps"),
        ("seconds,mbps\n", "up.csv: the trace is empty"),
        ("", "up.csv: the trace is empty"),
        ("seconds,mbps\n0,0\n5,0\n", "up.csv: mbps is 0 at all times"),
    ],
)
def test_traces_that_are_none(tmp_path: Path, text, message):
    file = tmp_path / "up.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        rate_from_csv(file)
    assert "\n" not in str(caught.value)


def test_traces_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read the trace .*gone.csv: No such file"):
        rate_from_csv(tmp_path / "gone.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        rate_from_csv(tmp_path / "binary.csv")
