"""Times over links, by hand and by property: loss, jitter, schedules; what cannot be a link."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds import Link, Rate, round_seconds
from fedjax_llm.errors import UserError

FAST = Link(up_mbps=100.0, down_mbps=1000.0, latency_ms=10.0)
SLOW = Link(up_mbps=1.0, down_mbps=8.0, latency_ms=250.0)


def test_seconds_by_hand():
    assert FAST.seconds_up(12_500_000) == pytest.approx(1.01)
    assert FAST.seconds_down(12_500_000) == pytest.approx(0.11)
    assert SLOW.seconds_up(0) == 0.25
    with pytest.raises(ValueError, match="zero or more"):
        SLOW.seconds_up(-1)


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.floats(0.01, 1e6), st.floats(0, 1e4))
def test_time_is_affine_in_bytes(a, b, mbps, latency):
    link = Link(mbps, 2 * mbps, latency)
    together = link.seconds_up(a) + link.seconds_up(b)
    assert together == pytest.approx(link.seconds_up(a + b) + latency / 1e3, rel=1e-9, abs=1e-9)
    assert link.seconds_down(a) <= link.seconds_up(a)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_bandwidths_that_are_none(bad):
    for name in ("up_mbps", "down_mbps"):
        with pytest.raises(UserError, match=f"{name} must be positive and finite"):
            Link(**({"up_mbps": 1.0, "down_mbps": 1.0} | {name: bad}))


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_latencies_that_are_none(bad):
    with pytest.raises(UserError, match="latency_ms"):
        Link(1.0, 1.0, bad)


def test_a_round_lasts_as_long_as_its_slowest_cloud():
    time = round_seconds(
        {"a": FAST, "b": SLOW, "out": SLOW},
        {"a": 1_000_000, "b": 1_000_000},
        {"a": 3.0, "b": 0.5},
        {"a": 125_000, "b": 125_000},
    )
    assert time.per_cloud == pytest.approx({"a": 0.018 + 3.0 + 0.02, "b": 1.25 + 0.5 + 1.25})
    assert time.seconds == pytest.approx(3.038) and time.slowest == "a"
    empty = round_seconds({"a": FAST}, {}, {}, {})
    assert empty.seconds == 0 and empty.slowest is None


def test_a_round_needs_the_same_clouds_everywhere():
    for down, train, up in (
        ({}, {"a": 1.0}, {"a": 1}),
        ({"a": 1}, {"a": 1.0}, {}),
        ({"b": 1}, {"b": 1.0}, {"b": 1}),
    ):
        with pytest.raises(ValueError, match="same known clouds"):
            round_seconds({"a": FAST}, down, train, up)
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="train_seconds of a"):
            round_seconds({"a": FAST}, {"a": 1}, {"a": seconds}, {"a": 1})


def test_loss_leaves_the_bound_of_tcp_and_what_is_not_sent_again():
    # Mathis et al. 1997: 1460 bytes x 8 / 0.1 s x sqrt(1.5 / 0.01) = 1.4305 Mbps for one stream.
    lossy = Link(100.0, 1.0, latency_ms=50.0, loss=0.01)
    assert lossy.up.mbps == pytest.approx(1.430502 * 0.99, rel=1e-5)
    assert lossy.down.mbps == pytest.approx(1.0 * 0.99), "below the bound only the share counts"
    assert Link(100.0, 1.0, 50.0, loss=0.01, streams=8).up.mbps == pytest.approx(
        8 * 1.430502 * 0.99, rel=1e-5
    )
    assert Link(100.0, 1.0, 0.0, loss=0.01).up.mbps == pytest.approx(99.0), (
        "no round trip, no bound"
    )
    assert lossy.sent_bytes(99) == pytest.approx(100)
    assert Link(100.0, 1.0, 50.0).up.mbps == 100.0


@given(
    st.floats(1, 1e4), st.floats(0, 500), st.floats(0, 0.5), st.floats(0, 0.4), st.integers(1, 9)
)
def test_more_loss_is_never_faster_and_more_streams_never_slower(
    mbps, latency, loss, more, streams
):
    link = Link(mbps, mbps, latency, loss=loss, streams=streams)
    worse = Link(mbps, mbps, latency, loss=loss + more, streams=streams)
    assert worse.up.mbps <= link.up.mbps <= mbps
    assert Link(mbps, mbps, latency, loss=loss, streams=streams + 1).up.mbps >= link.up.mbps


def test_jitter_is_exponential_and_addressed():
    link = Link(8.0, 8.0, latency_ms=10.0, jitter_ms=20.0, seed=5, cloud="eu")
    extra = np.array([link.up.seconds(10**6, index=k) - 1.01 for k in range(4000)])
    assert extra.min() >= 0
    # Four standard errors of the mean; the part above the mean of an exponential is 1/e.
    assert extra.mean() == pytest.approx(0.02, abs=4 * 0.02 / 4000**0.5)
    assert (extra > 0.02).mean() == pytest.approx(1 / math.e, abs=0.03)
    again = dataclasses.replace(link)
    assert [again.up.seconds(10**6, index=k) - 1.01 for k in (3999, 7, 7)] == [
        extra[3999],
        extra[7],
        extra[7],
    ]
    others = (
        link.down,
        dataclasses.replace(link, seed=6).up,
        dataclasses.replace(link, cloud="us").up,
    )
    for other in others:
        theirs = np.array([other.seconds(10**6, index=k) - 1.01 for k in range(4000)])
        assert abs(np.corrcoef(extra, theirs)[0, 1]) < 0.08


def test_a_link_over_time_is_its_schedules():
    office = Rate((0.0, 100.0), (8.0, 80.0), 200.0)
    link = Link.over_time(office, 16.0, latency_ms=500.0)
    assert link.up_mbps == 44.0 and link.down_mbps == 16.0
    assert link.up.finish(0.0, 10**6) == 1.5 and link.up.finish(100.0, 10**6) == 100.6
    assert link.up.finish(99.5, 10**6) == pytest.approx(100.55), "half before, half after"
    assert link.seconds_up(10**6, start_s=300.0) == pytest.approx(0.6)
    assert link.down.seconds(2 * 10**6, start_s=7.0) == 1.5
    lossy = Link.over_time(office, 16.0, latency_ms=0.0, loss=0.5)
    assert lossy.up.finish(0.0, 10**6) == 2.0
    with pytest.raises(UserError, match=r"up_mbps must be the mean of up_rate, 44, got 40"):
        Link(40.0, 16.0, up_rate=office)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": 1.0}, "loss must be zero or more and below 1, got 1.0; 1 % is 0.01"),
        ({"loss": -0.1}, "loss must be"),
        ({"loss": math.nan}, "loss must be"),
        ({"jitter_ms": -1.0}, "jitter_ms must be zero or more and finite, got -1.0"),
        ({"jitter_ms": math.inf}, "jitter_ms must be"),
        ({"streams": 0}, "streams must be at least 1, got 0"),
    ],
)
def test_links_that_are_none(bad, message):
    with pytest.raises(UserError, match=message):
        Link(1.0, 1.0, **bad)
