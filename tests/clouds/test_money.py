"""Money: a bill against a count message by message, by hand, and what holds for every timeline."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.clouds import Cloud, Egress, Link, Prices, Trace
from fedjax_llm.clouds.money import Bill, bill
from fedjax_llm.clouds.schedules import Deadline, Schedule, Streaming, Synchronous
from fedjax_llm.clouds.site import Opening, Site, Size
from fedjax_llm.clouds.timeline import Status, Timeline

from .test_schedules import ALL

TIERS = Egress((0.09, 0.05), (0.0, 0.004))
SIZE, OPENING = Size(250_000, 1_000_000), Opening(2, Size(10_000, 20_000))


def sites(clouds: Sequence[Cloud], train: Sequence[float]) -> list[Site]:
    return [
        Site(
            cloud.name, place, cloud.link.down.finish, cloud.link.up.finish,
            train[place], 1, [SIZE], None, cloud.presence,
        )
        for place, cloud in enumerate(clouds)
    ]  # fmt: skip


CLOUD = st.tuples(
    st.sampled_from([0.8, 2.0, 8.0]),  # megabits per second: 10, 4 and 1 seconds for a message
    st.sampled_from([0.0, 0.2]),  # of loss, on a link without latency: only sent again
    st.sampled_from([0.5, 2.0, 7.0]),  # seconds of training
    st.lists(st.floats(0.5, 40.0), max_size=5),  # times between changes of state
    st.sampled_from([Prices(), Prices(3600.0, internet=TIERS), Prices(360.0, 2)]),
)
DRAWN = st.lists(CLOUD, min_size=3, max_size=4)
SERVER = Prices(36.0, internet=Egress((0.2, 0.1), (0.0, 0.003)))


def made(drawn: list[tuple], server: Prices = SERVER) -> tuple[list[Cloud], list[float]]:
    clouds = []
    for place, (mbps, loss, _, gaps, prices) in enumerate(drawn):
        # Up for the last 50 seconds of each period, which are enough for a cycle.
        changes = (0.0, *np.cumsum(gaps[: len(gaps) // 2 * 2]).tolist())
        up = tuple(k % 2 == 0 for k in range(len(changes)))
        trace = Trace(changes, up, changes[-1] + 50.0)
        clouds.append(
            Cloud(
                f"cloud-{place}", Link(mbps, 4 * mbps, loss=loss), availability=trace,
                prices=prices, server=server,
            )
        )  # fmt: skip
    return clouds, [own[2] for own in drawn]


def simulated(schedule: Schedule, drawn: list[tuple], steps: int = 8) -> tuple[Timeline, Bill]:
    clouds, train = made(drawn)
    timeline = schedule.simulate(sites(clouds, train), steps, OPENING)
    return timeline, bill(timeline, clouds)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=DRAWN)
@settings(max_examples=20, deadline=None)
def test_every_byte_that_arrives_is_counted_once(schedule: Schedule, drawn):
    timeline, found = simulated(schedule, drawn)
    whole = parts = 0
    for cycle in timeline.cycles:
        if cycle.arrived <= timeline.seconds:
            whole += SIZE.up
        elif cycle.status is not Status.LOCAL and cycle.trained < timeline.seconds:
            parts += SIZE.up
    answers = 2 * len(timeline.steps) * OPENING.size.up
    up = found.up_NxC.sum()
    assert whole + answers - 1 <= up <= whole + answers + parts + 1
    asked = sum(found.down_NxC.sum(axis=0)) - 2 * len(timeline.steps) * OPENING.size.down
    received = [c for c in timeline.cycles if c.fresh and c.received <= timeline.seconds]
    sent = sum(at == at for own in timeline.broadcasts for at in own.start)
    assert asked <= SIZE.down * (len(timeline.table_M) + sent) + 1
    if not timeline.broadcasts:
        assert asked >= SIZE.down * len(received) - 1


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=DRAWN)
@settings(max_examples=20, deadline=None)
def test_sums_do_not_depend_on_where_steps_end(schedule: Schedule, drawn):
    timeline, found = simulated(schedule, drawn)
    clouds, _ = made(drawn)
    lossy = np.array([1 / (1 - cloud.link.loss) for cloud in clouds])
    for place, cloud in enumerate(clouds):
        up = cloud.availability.up_seconds(0.0, timeline.seconds)
        rent = cloud.prices.dollars_per_hour * cloud.prices.machines * up / 3600
        assert found.rent_NxC[:, place].sum() == pytest.approx(rent)
        sent = found.up_NxC[:, place].sum() * lossy[place]
        assert found.egress_NxC[:, place].sum() == pytest.approx(cloud.prices.egress.cost(sent))
    broadcast = (found.down_NxC.sum(axis=0) * lossy).sum()
    egress = SERVER.egress.cost(broadcast)
    assert found.server_N.sum() == pytest.approx(egress + timeline.seconds / 100)
    assert found.dollars == pytest.approx(found.clouds_NxC.sum() + found.server_N.sum())
    assert (found.lost_C <= found.clouds_NxC.sum(axis=0) + 1e-9).all()
    assert all((own >= 0).all() for own in (found.egress_NxC, found.down_NxC, found.lost_C))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(drawn=DRAWN, steps=st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_the_bill_of_a_run_cut_short_begins_as_the_whole_one(schedule: Schedule, drawn, steps):
    timeline, found = simulated(schedule, drawn)
    cut = bill(timeline.until(steps), made(drawn)[0])
    assert cut.clouds_NxC.shape == (steps, len(drawn))
    np.testing.assert_allclose(cut.rent_NxC, found.rent_NxC[:steps])
    np.testing.assert_allclose(cut.up_NxC[:-1], found.up_NxC[: steps - 1])
    # What is under way when the run ends counts as far as it has come.
    assert (cut.up_NxC[-1] >= found.up_NxC[steps - 1] - 1e-6).all()
    assert cut.up_NxC.sum() <= found.up_NxC.sum() + 1e-6


@given(drawn=DRAWN)
@settings(max_examples=20, deadline=None)
def test_twice_the_prices_are_twice_the_bill(drawn):
    def double(prices: Prices) -> Prices:
        egress = prices.internet
        return Prices(
            2 * prices.dollars_per_hour,
            prices.machines,
            internet=Egress(tuple(2 * price for price in egress.dollars), egress.above),
        )

    clouds, train = made(drawn)
    timeline = Synchronous().simulate(sites(clouds, train), 4, OPENING)
    dear, _ = made([(*own[:4], double(own[4])) for own in drawn], double(SERVER))
    assert bill(timeline, dear).dollars == pytest.approx(2 * bill(timeline, clouds).dollars)


def test_a_bill_by_hand():
    # A message takes 1 second down and 1 second up, training 2: rounds of 4 seconds. Cloud b is
    # down from 2.5 to 6 and through at 10; its second round is through at 14.
    link = Link(8.0, 2.0)
    prices = Prices(3600.0, internet=Egress((100.0, 50.0), (0.0, 0.0015)))
    server = Prices(7200.0, same_continent=Egress((10.0,)), internet=Egress((1000.0,)))
    near = Prices(7200.0, same_continent=Egress((10.0,)), destination="same-continent")
    down = Trace((0.0, 2.5, 6.0), (True, False, True))
    clouds = [
        Cloud("a", link, prices=prices, server=near),
        Cloud("b", link, availability=down, prices=prices, server=server),
    ]
    found = bill(Synchronous().simulate(sites(clouds, [2.0, 2.0]), 2), clouds)
    np.testing.assert_allclose(found.rent_NxC, [[10.0, 6.5], [4.0, 4.0]])
    # A gigabyte costs 100 dollars, from the second half of the second megabyte on 50.
    np.testing.assert_allclose(found.egress_NxC, [[0.1, 0.1], [0.075, 0.075]])
    # What b received before it went down had arrived, and was sent for nothing.
    np.testing.assert_allclose(found.down_NxC, [[250_000, 500_000], [250_000, 250_000]])
    np.testing.assert_allclose(found.server_rent_N, [20.0, 8.0])
    np.testing.assert_allclose(found.server_egress_NxC, [[0.0025, 0.5], [0.0025, 0.25]])
    np.testing.assert_allclose(found.lost_C, [0.0, 2.5])
    assert found.dollars == pytest.approx(24.5 + 0.35 + 28 + 0.755)
    assert found.bytes == 4 * 1_000_000 + 5 * 250_000


def test_what_a_deadline_cuts_off_is_paid_for_as_far_as_it_came():
    clouds = [Cloud(name, Link(up, 8.0), prices=Prices(internet=Egress((1000.0,))))
              for name, up in (("a", 8.0), ("b", 0.8))]  # fmt: skip
    # Cloud b sends for a quarter of a second and needs ten.
    found = bill(Deadline(2.5, 1).simulate(sites(clouds, [1.0, 2.0]), 1), clouds)
    np.testing.assert_allclose(found.up_NxC, [[1_000_000, 25_000]])
    found = bill(Deadline(3.25, 1).simulate(sites(clouds, [1.0, 2.0]), 1), clouds)
    np.testing.assert_allclose(found.up_NxC, [[1_000_000, 100_000]])
    np.testing.assert_allclose(found.lost_C, [0.0, 0.1])


def test_only_a_replica_that_is_lost_is_sent_whole():
    # Cloud 1 is down from 2.5 to 6, in its first cycle, and begins again.
    down = Trace((0.0, 2.5, 6.0), (True, False, True))
    link, whole = Link(8.0, 8.0), 3 * SIZE.down
    clouds = [Cloud("a", link), Cloud("b", link, availability=down)]
    for schedule, expected in (
        (Synchronous(), SIZE.down * np.array([1, 2])),
        (Streaming(3), np.array([whole, 2 * whole])),
    ):
        made = [
            Site(
                own.name, place, own.link.down.finish, own.link.up.finish,
                2.0, 1, [SIZE], whole, own.presence,
            )
            for place, own in enumerate(clouds)
        ]  # fmt: skip
        found = bill(schedule.simulate(made, 1), clouds)
        np.testing.assert_allclose(found.down_NxC.sum(axis=0), expected)


def test_nothing_is_lost_where_nothing_fails():
    clouds, train = made([(8.0, 0.0, 2.0, [], Prices(3600.0))] * 3)
    always = [Cloud(cloud.name, cloud.link, prices=cloud.prices) for cloud in clouds]
    for schedule in ALL:
        timeline = schedule.simulate(sites(always, train), 6, OPENING)
        found = bill(timeline, always)
        late = [c for c in timeline.cycles if c.status is Status.LATE]
        assert bool(found.lost_C.any()) == bool(late)
        assert found.server_N.sum() == 0 and math.isfinite(found.dollars)
