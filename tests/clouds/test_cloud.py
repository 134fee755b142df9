"""Clouds: their names, their seeds, and how their parts go together."""

import pytest

from fedjax_llm.clouds import Cloud, Egress, Failures, Link, Prices, check_unique
from fedjax_llm.errors import UserError

FAST = Link(up_mbps=100.0, down_mbps=1000.0, latency_ms=10.0)
SLOW = Link(up_mbps=1.0, down_mbps=8.0, latency_ms=250.0)


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


def test_seeded_addresses_link_and_failures_by_seed_and_name():
    link = Link(8.0, 8.0, jitter_ms=50.0)
    plain = [Cloud(name, link, availability=Failures(900.0, 100.0)) for name in ("eu", "us")]

    def times(cloud: Cloud) -> tuple[float, float]:
        return cloud.link.up.seconds(0, index=3), cloud.availability.up_seconds(0.0, 1e5)

    assert times(plain[0]) == times(plain[1]), "unseeded they share every draw"
    drawn = [times(cloud.seeded(seed)) for cloud in plain for seed in (1, 2)]
    assert len({value for pair in drawn for value in pair}) == 8
    assert times(plain[0].seeded(1).seeded(2)) == drawn[1], "the last seed counts"
    assert Cloud("eu", FAST).seeded(4).link.up.seconds(10**6) == FAST.up.seconds(10**6)


def test_a_lossy_link_is_billed_for_what_it_sends_again():
    prices = Prices(dollars_per_hour=3600.0, internet=Egress((0.1,)))
    lossy = Link(1.0, 1.0, loss=0.5)
    assert Cloud("eu", SLOW, prices=prices).dollars(2.0, 10**9) == pytest.approx(2.1)
    assert Cloud("eu", lossy, prices=prices).dollars(2.0, 10**9) == pytest.approx(2.2)
