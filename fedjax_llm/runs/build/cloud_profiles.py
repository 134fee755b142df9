"""From a run file to profiles of clouds: what it says, and the catalogue where it says nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedjax_llm.clouds import (
    Always,
    Availability,
    Catalogue,
    Cloud,
    Compute,
    Egress,
    Failures,
    Link,
    Prices,
    Rate,
    load_catalogue,
    rate_from_csv,
    trace_from_csv,
    training_flops,
)
from fedjax_llm.errors import UserError
from fedjax_llm.runs.sections.clouds import AvailabilitySection, ComputeSection, PricesSection
from fedjax_llm.runs.sections.clouds import Cloud as CloudSection
from fedjax_llm.runs.sections.clouds import Link as LinkSection
from fedjax_llm.runs.sections.schema import RunFile

if TYPE_CHECKING:
    from fedjax_llm.models import DecoderConfig

# A link of which nothing is known, neither from the run file nor from regions.
MBPS, LATENCY_MS = 100.0, 20.0


def catalogue(run_file: RunFile) -> Catalogue:
    """The package's figures, with the user's file laid over them."""
    return load_catalogue(None if run_file.catalogue is None else Path(run_file.catalogue))


def profile(cloud: CloudSection, run_file: RunFile, figures: Catalogue) -> Cloud:
    """The profile of one cloud, with its random numbers addressed by the run's seed.

    Args:
        cloud: what the run file says of it; keys that are given win over the catalogue.
        run_file: for the server's region and the seed.
        figures: the catalogue.

    Raises:
        UserError: a name that the catalogue does not have, a trace that cannot be, or keys that
            contradict each other; one line, the file and line of a trace in front.
    """
    server = run_file.server_region
    if server is not None:
        figures.region(server)
    return Cloud(
        cloud.name,
        _link(cloud, server, figures),
        compute=_compute(cloud, figures),
        availability=_availability(cloud.availability),
        prices=_prices(cloud.prices, cloud.region, cloud.instance, server, figures),
        region=cloud.region,
        instance=cloud.instance,
        server=_prices(run_file.server_prices, server, None, cloud.region, figures),
    ).seeded(run_file.seed)


def profiles(run_file: RunFile, config: "DecoderConfig | None" = None) -> tuple[Cloud, ...]:
    """The profiles of all clouds, in order.

    Args:
        run_file: the settings.
        config: of the model; with it the speed of clouds that is derived from FLOP/s is known.

    Raises:
        UserError: see `profile`.
    """
    figures = catalogue(run_file)
    found = [profile(cloud, run_file, figures) for cloud in run_file.clouds]
    if config is None:
        return tuple(found)
    return tuple(
        cloud
        if cloud.compute is None
        else dataclasses.replace(
            cloud, compute=cloud.compute.for_model(flops_per_token(run_file, section, config))
        )
        for cloud, section in zip(found, run_file.clouds, strict=True)
    )


def flops_per_token(run_file: RunFile, cloud: CloudSection, config: "DecoderConfig") -> float:
    """What training a cloud's adapter on one token takes; see `clouds.training_flops`."""
    from fedjax_llm.lora.adapter import target_names
    from fedjax_llm.models.config import projection_shapes

    shapes = projection_shapes(config)
    rank = cloud.rank or run_file.adapter.rank
    adapted = target_names(config, run_file.adapter.targets)
    matrices = sum(inputs * outputs for inputs, outputs in shapes.values())
    return training_flops(
        config.num_layers * matrices + config.vocab_size * config.hidden_size,
        adapter=config.num_layers * rank * sum(sum(shapes[name]) for name in adapted),
        layers=config.num_layers,
        width=config.num_heads * config.head_dim,
        length=run_file.training.sequence_length,
        remat=run_file.training.remat,
    )


def _link(cloud: CloudSection, server: str | None, figures: Catalogue) -> Link:
    own = cloud.link
    ends = None if cloud.region is None or server is None else (cloud.region, server)
    rates = []
    for way in ("up", "down"):
        rate = _given_rate(own, way)
        if rate is None and ends is not None:
            rate = figures.mbps(*ends, cloud.instance, own.streams)
        elif rate is None and cloud.region is not None:
            figures.region(cloud.region)
            raise UserError(
                f"region says nothing about the link's {way}_mbps without server_region; set one "
                "of them"
            )
        rates.append(MBPS if rate is None else rate)
    latency = own.latency_ms
    if latency is None:
        latency = LATENCY_MS if ends is None else figures.route(*ends).rtt_ms / 2
    return Link.over_time(
        *rates,
        latency_ms=latency,
        jitter_ms=own.jitter_ms,
        loss=own.loss,
        streams=own.streams,
    )


def _given_rate(own: LinkSection, way: str) -> float | Rate | None:
    trace: str | None = getattr(own, f"{way}_trace")
    steps: Sequence[tuple[float, float]] | None = getattr(own, f"{way}_schedule")
    if trace is not None:
        return rate_from_csv(Path(trace), own.period_s)
    if steps is not None:
        return Rate(tuple(s for s, _ in steps), tuple(m for _, m in steps), own.period_s)
    mbps: float | None = getattr(own, f"{way}_mbps")
    return mbps


def _compute(cloud: CloudSection, figures: Catalogue) -> Compute | None:
    own = cloud.compute or ComputeSection()
    if cloud.instance is None:
        if cloud.compute is None:
            return None
        if own.tokens_per_second is None and own.peak_tflops is None:
            raise UserError("compute needs tokens_per_second or peak_tflops, or an instance")
        peak, memory, count = None, None, 1
    else:
        listed = figures.compute(cloud.instance)
        peak, memory, count = listed.peak_flops, listed.memory_gib, listed.accelerators
    machines = 1 if cloud.prices is None else cloud.prices.machines
    count = own.accelerators or count * machines
    memory = own.memory_gib or memory
    if own.tokens_per_second is not None:
        return Compute(own.tokens_per_second, accelerators=count, memory_gib=memory)
    return Compute(
        peak_flops=peak if own.peak_tflops is None else own.peak_tflops * 1e12,
        utilization=own.utilization,
        accelerators=count,
        memory_gib=memory,
    )


def _availability(own: AvailabilitySection | None) -> Availability:
    if own is None:
        return Always()
    if own.trace is not None:
        return trace_from_csv(Path(own.trace), own.period_s)
    assert own.mtbf_s is not None and own.mttr_s is not None
    return Failures(own.mtbf_s, own.mttr_s)


def _prices(
    own: PricesSection | None,
    region: str | None,
    instance: str | None,
    other: str | None,
    figures: Catalogue,
) -> Prices:
    """What a cloud pays, or the server, where its bytes go to the region `other`."""
    provider = None
    if region is not None:
        provider = figures.region(region).provider
    elif instance is not None:
        provider = figures.instance(instance).provider
    destination = None if own is None else own.destination
    if destination is None and region is not None and other is not None:
        destination = figures.destination(region, other)
    destination = destination or "internet"
    if provider is None:
        prices = Prices(destination=destination)
    else:
        prices = figures.prices(provider, instance, destination)
    if own is None:
        return prices
    prices = dataclasses.replace(prices, machines=own.machines)
    if own.dollars_per_hour is not None:
        prices = dataclasses.replace(prices, dollars_per_hour=own.dollars_per_hour)
    if own.egress_dollars_per_gb is not None:
        mine = Egress((own.egress_dollars_per_gb,))
        key = destination.replace("-", "_")
        prices = dataclasses.replace(prices, **{key: mine})  # type: ignore[arg-type]
    return prices
