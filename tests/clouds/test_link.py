"""Times over links, by hand and by property; what cannot be a link or a cloud."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds import Cloud, Link, check_unique, round_seconds
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


@pytest.mark.parametrize("name", ["", "Frankfurt", "a b", "a/b", "..", "ü", "a\n"])
def test_cloud_names_that_are_none(name):
    with pytest.raises(UserError, match="cloud name"):
        Cloud(name, FAST)


def test_cloud_names_are_unique():
    check_unique((Cloud("eu-west_1", FAST), Cloud("us", FAST)))
    with pytest.raises(UserError, match="used twice"):
        check_unique((Cloud("us", FAST), Cloud("us", SLOW)))
    with pytest.raises(UserError, match="at least one cloud"):
        check_unique(())
