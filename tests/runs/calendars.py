"""A calendar of clouds that differ and sometimes fail, for what is made of calendars."""

from fedjax_llm.clouds import Cloud, Egress, Failures, Link, Prices
from fedjax_llm.clouds.schedules import Schedule
from fedjax_llm.clouds.site import Site, Size
from fedjax_llm.federation.calendar import Calendar

PRICES = Prices(3600.0, internet=Egress((50.0,)))


def calendar(schedule: Schedule, steps: int = 10, count: int = 3) -> Calendar:
    """Clouds of different links, every second of which fails now and then."""
    clouds = [
        Cloud(
            f"cloud-{place}",
            Link(8.0 / (1 + place % 3), 40.0, latency_ms=20.0),
            prices=PRICES,
            server=Prices(36.0, internet=Egress((20.0,))),
        )
        for place in range(count)
    ]
    for place in range(1, count, 2):
        failing = Failures(15.0, 4.0)
        clouds[place] = Cloud(f"cloud-{place}", Link(4.0, 40.0), None, failing, PRICES)
    clouds = [cloud.seeded(7) for cloud in clouds]
    sites = [
        Site(
            own.name, place, own.link.down.finish, own.link.up.finish, 0.5, 3,
            [Size(400_000, 300_000)], None, own.presence,
        )
        for place, own in enumerate(clouds)
    ]  # fmt: skip
    return Calendar(schedule, schedule.simulate(sites, steps), range(count), clouds)
