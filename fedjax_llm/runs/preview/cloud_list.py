"""The tables of `fedjax-llm clouds`: what the catalogue has, and where it has it from."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.clouds import Catalogue, load_catalogue


def instances(figures: Catalogue) -> list[list[str]]:
    """A row for each machine type."""
    rows = []
    for name, instance in figures.instances.items():
        accelerator = figures.accelerators[instance.accelerator]
        rows.append(
            [
                name,
                f"{instance.accelerators} x {accelerator.title}",
                f"{instance.memory_gib:g}",
                f"{accelerator.bf16_tflops:g}",
                _known(instance.network_gbps),
                f"{instance.dollars_per_hour:.3f}",
                instance.priced_in,
                ", ".join(dict.fromkeys(filter(None, _sources(figures, name)))),
            ]
        )
    return rows


def _sources(figures: Catalogue, name: str) -> tuple[str, str, str]:
    instance = figures.instances[name]
    accelerator = figures.accelerators[instance.accelerator]
    return instance.price_source, instance.source, accelerator.source


def egress(figures: Catalogue) -> list[list[str]]:
    """A row for each provider."""
    return [
        [
            name,
            provider.unit,
            *(
                _tiers(tiers)
                for tiers in (
                    provider.same_region,
                    provider.same_continent,
                    provider.other_continent,
                    provider.internet,
                )
            ),
            _known(provider.wide_area_gbps),
            ", ".join(filter(None, (provider.source, provider.wide_area_source))),
        ]
        for name, provider in figures.providers.items()
    ]


def _tiers(tiers: Sequence[tuple[float, float]]) -> str:
    """Prices from a volume on: `0.09, above 10240: 0.085`."""
    return ", ".join(
        f"{price:g}" if above == 0 else f"above {above:g}: {price:g}" for above, price in tiers
    )


def routes(figures: Catalogue) -> list[list[str]]:
    """A row for each pair of regions."""
    return [
        [*name.split(" "), _known(route.mbps), f"{route.rtt_ms:g}", route.source]
        for name, route in figures.routes.items()
    ]


def _known(value: float) -> str:
    return f"{value:g}" if value else "–"


def show(console: Console, own: Path | None = None) -> None:
    """Prints the catalogue, with a user's file laid over it."""
    figures = load_catalogue(own)
    heads = ["instance", "accelerators", "GiB each", "bf16 TFLOP/s", "Gbps", "$/h", "priced in"]
    _table(console, [*heads, "sources"], instances(figures))
    heads = ["egress, $", "per", "same region", "same continent", "other continent", "internet"]
    _table(console, [*heads, "Gbps outside", "sources"], egress(figures))
    heads = ["route", "", "Mbps of one stream", "round trip ms", "source"]
    _table(console, heads, routes(figures))
    rows = [[name, s.date, s.title, s.url] for name, s in figures.sources.items()]
    _table(console, ["source", "date", "", ""], rows)


def _table(console: Console, heads: list[str], cells: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
