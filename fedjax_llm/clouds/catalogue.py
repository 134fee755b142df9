"""The catalogue: machines, prices and routes of the large providers, each figure with its source.

The figures are list prices and datasheets of a date; `catalogue.toml` beside this module has them,
and `catalogue_file` reads it.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedjax_llm.clouds.compute import Compute
from fedjax_llm.clouds.prices import GB, GIB, Destination, Egress, Prices
from fedjax_llm.errors import UserError

# A text that has to be the name of an entry of another section: `catalogue_file` checks it.
_SOURCE = {"section": "sources"}
_PROVIDER = {"section": "providers"}
_ACCELERATOR = {"section": "accelerators"}


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
        title: the document, and what it is.
        date: of the figures, or of the reading where the document has none; ISO 8601.
        url: where it can be read; empty for a document of one's own.
    """

    title: str
    date: str
    url: str = ""


@dataclass(frozen=True)
class Accelerator:
    """A chip.

    Attributes:
        title: its name.
        bf16_tflops: peak of dense matrix products in bfloat16, 10^12 FLOP/s.
        source: name of a source.
    """

    title: str
    bf16_tflops: float
    source: str = field(default="", metadata=_SOURCE)


@dataclass(frozen=True)
class Instance:
    """A machine type.

    Attributes:
        provider: name of a provider.
        accelerator: name of an accelerator.
        accelerators: how many it has.
        memory_gib: of each accelerator, as the provider states it.
        dollars_per_hour: on demand.
        priced_in: the region of that price.
        price_source: name of a source.
        source: of the other figures.
        network_gbps: of its network interfaces; 0 if not known.
    """

    provider: str = field(metadata=_PROVIDER)
    accelerator: str = field(metadata=_ACCELERATOR)
    accelerators: int
    memory_gib: float
    dollars_per_hour: float
    priced_in: str = ""
    price_source: str = field(default="", metadata=_SOURCE)
    source: str = field(default="", metadata=_SOURCE)
    network_gbps: float = 0.0


@dataclass(frozen=True)
class Provider:
    """What holds for all machines of a provider.

    Attributes:
        unit: "GB" (10^9 bytes) or "GiB" (2^30), by which data are billed.
        same_region: tiers [[above, dollars], ...] of egress: see `prices.Egress`.
        same_continent: the same, to another region on the continent.
        other_continent: the same, to a region on another one.
        internet: the same, to other providers and everybody else.
        source: of the egress prices.
        wide_area_gbps: what a machine gets to other regions and to the internet; 0 if not known.
        wide_area_source: of that.
    """

    unit: str
    same_region: tuple[tuple[float, float], ...]
    same_continent: tuple[tuple[float, float], ...]
    other_continent: tuple[tuple[float, float], ...]
    internet: tuple[tuple[float, float], ...]
    source: str = field(default="", metadata=_SOURCE)
    wide_area_gbps: float = 0.0
    wide_area_source: str = field(default="", metadata=_SOURCE)


@dataclass(frozen=True)
class Region:
    """A provider's region.

    Attributes:
        provider: name of a provider.
        continent: which decides prices of egress.
    """

    provider: str = field(metadata=_PROVIDER)
    continent: str


@dataclass(frozen=True)
class Route:
    """Two regions and what lies between them.

    Attributes:
        rtt_ms: round trip.
        mbps: that one TCP stream reaches, the slower direction; 0 if not known.
        source: name of a source.
    """

    rtt_ms: float
    mbps: float = 0.0
    source: str = field(default="", metadata=_SOURCE)


@dataclass(frozen=True)
class Catalogue:
    """All of it, by name. A route is named by its two regions, in either order."""

    sources: Mapping[str, Source]
    accelerators: Mapping[str, Accelerator]
    providers: Mapping[str, Provider]
    instances: Mapping[str, Instance]
    regions: Mapping[str, Region]
    routes: Mapping[str, Route]

    def instance(self, name: str) -> Instance:
        """A machine type. Raises UserError, with the nearest name, if there is none."""
        return _named(self.instances, name, "instance")

    def region(self, name: str) -> Region:
        """A region. Raises UserError, with the nearest name, if there is none."""
        return _named(self.regions, name, "region")

    def compute(
        self, name: str, *, accelerators: int | None = None, utilization: float | None = None
    ) -> Compute:
        """The speed and memory of an instance, or of some of its accelerators."""
        instance = self.instance(name)
        return Compute(
            peak_flops=self.accelerators[instance.accelerator].bf16_tflops * 1e12,
            utilization=utilization,
            accelerators=accelerators or instance.accelerators,
            memory_gib=instance.memory_gib,
        )

    def prices(
        self, provider: str, instance: str | None = None, destination: Destination = "internet"
    ) -> Prices:
        """A provider's egress prices, with uploads going to `destination`, and an instance's rent.

        Raises:
            UserError: no such instance, or one of another provider.
        """
        own = self.providers[provider]
        unit = GIB if own.unit == "GiB" else GB

        def egress(tiers: tuple[tuple[float, float], ...]) -> Egress:
            return Egress(tuple(price for _, price in tiers), tuple(a for a, _ in tiers), unit)

        rent = 0.0
        if instance is not None:
            machine = self.instance(instance)
            if machine.provider != provider:
                raise UserError(
                    f"instance {instance!r} is one of {machine.provider}, and the region is one of "
                    f"{provider}; change one of them"
                )
            rent = machine.dollars_per_hour
        return Prices(
            dollars_per_hour=rent,
            same_region=egress(own.same_region),
            same_continent=egress(own.same_continent),
            other_continent=egress(own.other_continent),
            internet=egress(own.internet),
            destination=destination,
        )

    def destination(self, region: str, server: str) -> Destination:
        """The class that data from `region` to the server's region are billed by."""
        here, there = self.region(region), self.region(server)
        if here.provider != there.provider:
            return "internet"
        if region == server:
            return "same-region"
        return "same-continent" if here.continent == there.continent else "other-continent"

    def route(self, region: str, server: str) -> Route:
        """What lies between two regions. Raises UserError if it is not known."""
        self.region(region), self.region(server)
        found = self.routes.get(f"{region} {server}") or self.routes.get(f"{server} {region}")
        if found is None:
            raise UserError(
                f"the catalogue has no route between {region} and {server}; give the link's "
                "up_mbps, down_mbps and latency_ms, or add the route to your own catalogue"
            )
        return found

    def mbps(self, region: str, server: str, instance: str | None, streams: int) -> float:
        """What `streams` TCP streams reach between two regions, in megabits per second.

        Streams add up until the machine's own limit towards the wide area, where it is known.

        Raises:
            UserError: the route, or its bandwidth, is not known.
        """
        one = self.route(region, server).mbps
        if not one:
            raise UserError(
                f"the catalogue knows the latency between {region} and {server}, not the "
                "bandwidth; give the link's up_mbps and down_mbps"
            )
        limits = [self.providers[self.region(region).provider].wide_area_gbps]
        if instance is not None:
            limits.append(self.instance(instance).network_gbps)
        return min([one * streams, *(limit * 1e3 for limit in limits if limit)])


def _named[T](table: Mapping[str, T], name: str, what: str) -> T:
    if name in table:
        return table[name]
    nearest = hint(name, table) or "; `fedjax-llm clouds` lists them"
    raise UserError(f"unknown {what} {name!r}{nearest}")


def hint(word: str, valid: Iterable[str]) -> str:
    """What `word` most likely meant, to end an error with; empty if nothing is near."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
