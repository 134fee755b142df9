"""[[clouds]]: one cloud and its sections, and what in them contradicts itself."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedjax_llm.clouds.prices import Destination
from fedjax_llm.runs.sections.harmonise import CloudHarmoniseSection
from fedjax_llm.runs.sections.partition import DividingKeys, How
from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import (
    Count,
    MappingSection,
    NotNegative,
    Positive,
    Section,
    Text,
    Texts,
    check_sources,
)

# Where a cloud names a trace file: its section and key.
TRACES = (("link", "up_trace"), ("link", "down_trace"), ("availability", "trace"))

Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[
    tuple[Annotated[tuple[NotNegative, NotNegative], Field(strict=False)], ...],
    Field(strict=False, min_length=1),
]


def _one_of(section: Section, keys: tuple[str, ...]) -> None:
    """Of keys that exclude each other, at most one is given."""
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) > 1:
        raise problem((given[1],), f"does not go together with {given[0]}; remove one", got=False)


def _needs(section: Section, key: str, others: tuple[str, ...]) -> None:
    """A key that is given needs one of the others."""
    if getattr(section, key) is not None and all(getattr(section, k) is None for k in others):
        raise problem((key,), f"goes with {' or '.join(others)}; remove it", got=False)


class Link(Section):
    """A cloud's wide-area link, for virtual time: rates in megabits per second, latency one way.

    A direction has a constant rate, a schedule of [second, mbps] or a trace file with the columns
    `seconds,mbps`; schedules and traces repeat every `period_s`, if that is given. What is left out
    comes from the catalogue's route between the regions of cloud and server; without regions it is
    100 Mbps each way and 20 ms.
    """

    up_mbps: Positive | None = None
    down_mbps: Positive | None = None
    up_schedule: Steps | None = None
    down_schedule: Steps | None = None
    up_trace: Text | None = None
    down_trace: Text | None = None
    period_s: Positive | None = None
    latency_ms: NotNegative | None = None
    jitter_ms: NotNegative = 0.0
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    streams: Count = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for way in ("up", "down"):
            _one_of(self, (f"{way}_mbps", f"{way}_schedule", f"{way}_trace"))
        over_time = ("up_schedule", "down_schedule", "up_trace", "down_trace")
        _needs(self, "period_s", over_time)
        return self


class ComputeSection(Section):
    """A cloud's speed: measured tokens per second, or the peak of its accelerators.

    Left out, together with `instance`, virtual time assumes one accelerator (`federation.virtual`).
    With `instance` these keys correct what the catalogue has; `accelerators` are those of all
    machines.
    """

    tokens_per_second: Positive | None = None
    peak_tflops: Positive | None = None
    utilization: Share | None = None
    accelerators: Count | None = None
    memory_gib: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _one_of(self, ("tokens_per_second", "peak_tflops"))
        _one_of(self, ("tokens_per_second", "utilization"))
        return self


class PricesSection(Section):
    """What a cloud costs: an hour of a machine, a GB (10^9 bytes) that leaves it for the server.

    As top-level `server_prices` the same of the server, whose bytes leave for the clouds. With
    `instance` these keys correct what the catalogue has. `destination` says how the provider
    classes the server; it follows from the regions if both are given.
    """

    dollars_per_hour: NotNegative | None = None
    machines: Count = 1
    egress_dollars_per_gb: NotNegative | None = None
    destination: Destination | None = None


class AvailabilitySection(Section):
    """When a cloud is up: mean seconds to failure and to repair, or a trace `seconds,up`."""

    mtbf_s: Positive | None = None
    mttr_s: Positive | None = None
    trace: Text | None = None
    period_s: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _one_of(self, ("trace", "mtbf_s"))
        _one_of(self, ("trace", "mttr_s"))
        _needs(self, "period_s", ("trace",))
        _needs(self, "mtbf_s", ("mttr_s",))
        _needs(self, "mttr_s", ("mtbf_s",))
        if self.trace is None and self.mtbf_s is None:
            raise problem((), "needs mtbf_s and mttr_s, or a trace; or remove it")
        return self


class DataSection(Section):
    """A cloud's data: files or folders (or `builtin:NAME`), how many rows, how much is held out."""

    sources: Texts
    limit: Count | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    mapping: MappingSection | None = None

    @model_validator(mode="after")
    def _sources(self) -> Self:
        check_sources(("sources",), self.sources, self.mapping)
        return self


class Cloud(DividingKeys):
    """[[clouds]]: one site with its own link, and its own data unless [partition] gives it some.

    In `offline_rounds` it cannot be reached: neither its update nor its part of a decryption come.
    `rank`, `local_steps` and `batch_size` are this cloud's own, at most those of [adapter] and
    [training]; with privacy per example or user a cloud's sampling rate is its own batch over its
    own rows, and the epsilon that is stated is the largest. `weight` counts with [aggregation]
    weights = "public". With `clients` above 1 its training rows are divided by `partition` among so
    many clients (as [partition] divides a corpus by `how`, with the same keys), whose updates are
    summed inside the cloud before anything leaves it, unless the rule or combination reads each.
    `instance` and `region` are names of the catalogue (`fedjax-llm clouds`), which says what
    `link`, `compute` and `prices` leave out.
    """

    name: str = Field(min_length=1, max_length=64)
    instance: Text | None = None
    region: Text | None = None
    link: Link = Link()
    compute: ComputeSection | None = None
    prices: PricesSection | None = None
    availability: AvailabilitySection | None = None
    data: DataSection | None = None
    harmonise: CloudHarmoniseSection | None = None
    offline_rounds: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    rank: Count | None = None
    local_steps: Count | None = None
    batch_size: Count | None = None
    weight: Positive = 1.0
    clients: Count = 1
    partition: How = "iid"
