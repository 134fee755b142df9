"""Money: tiers against a count unit by unit, units of providers, prices that cannot be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds import Egress, Prices
from fedjax_llm.clouds.prices import DESTINATIONS, GIB
from fedjax_llm.errors import UserError

AWS = Egress((0.0, 0.09, 0.085, 0.07), (0.0, 100.0, 10240.0, 51200.0))
egress = st.lists(st.integers(1, 50), min_size=0, max_size=4, unique=True).flatmap(
    lambda above: st.builds(
        Egress,
        st.tuples(*[st.integers(0, 9).map(float)] * (len(above) + 1)),
        st.just((0.0, *map(float, sorted(above)))),
    )
)


@given(egress, st.integers(0, 80), st.integers(0, 80))
def test_tiers_are_a_count_unit_by_unit(prices, size, before):
    count = 0.0
    for unit in range(before, before + size):
        tier = max(k for k, above in enumerate(prices.above) if above <= unit)
        count += prices.dollars[tier]
    assert prices.cost(size * 1e9, before * 1e9) == pytest.approx(count, abs=1e-6)


@given(egress, st.floats(0, 8e10), st.floats(0, 8e10), st.floats(0, 8e10))
def test_a_bill_does_not_depend_on_how_it_is_cut(prices, before, a, b):
    parts = prices.cost(a, before) + prices.cost(b, before + a)
    assert prices.cost(a + b, before) == pytest.approx(parts, abs=1e-6)
    assert parts >= -1e-9


def test_bills_by_hand():
    assert AWS.cost(100e9) == 0 and AWS.cost(200e9) == pytest.approx(9.0)
    assert AWS.cost(1e12, before=60e12) == pytest.approx(70.0)
    assert Egress((0.12,), unit_bytes=GIB).cost(GIB) == 0.12
    prices = Prices(
        dollars_per_hour=36.0,
        machines=2,
        same_continent=Egress((0.02,)),
        internet=Egress((0.09,)),
    )
    assert prices.dollars(100.0, 10**10) == pytest.approx(2 + 0.9)
    near = Prices(36.0, 2, same_continent=Egress((0.02,)), destination="same-continent")
    assert near.dollars(100.0, 10**10) == pytest.approx(2 + 0.2)
    assert Prices().dollars(1e9, 1e15) == 0
    for destination in DESTINATIONS:
        assert Prices(destination=destination).egress.cost(1e15) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dollars": (-0.1,)}, "egress price must be zero or more dollars per GB, got -0.1"),
        ({"dollars": (math.nan,)}, "egress price must be"),
        ({"dollars": (1.0, 2.0)}, "egress tiers must begin at 0 and rise, one price each"),
        ({"dollars": (1.0, 2.0), "above": (0.0, 0.0)}, "egress tiers must begin at 0 and rise"),
        ({"dollars": (1.0,), "above": (5.0,)}, "egress tiers must begin at 0 and rise"),
        ({"dollars": (1.0, 2.0), "above": (0.0, math.nan)}, "egress tiers must begin at 0"),
        ({"unit_bytes": 1000}, "a GB has 1000000000 bytes or 1073741824, got 1000"),
    ],
)
def test_egress_that_is_none(values, message):
    with pytest.raises(UserError, match=message):
        Egress(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dollars_per_hour": -1.0}, "dollars_per_hour must be zero or more and finite, got -1"),
        ({"dollars_per_hour": math.inf}, "dollars_per_hour must be"),
        ({"machines": 0}, "machines must be at least 1, got 0"),
        ({"destination": "moon"}, "destination must be one of same-region, .* got 'moon'"),
    ],
)
def test_prices_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        Prices(**values)
