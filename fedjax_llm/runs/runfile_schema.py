"""The run file as frozen, typed objects: one class for each section, and what must fit together."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.runfile_aggregation import (
    AggregationSection,
    AttackSection,
    check_aggregation,
    check_attack,
)
from fedjax_llm.runs.runfile_clouds import AvailabilitySection, ComputeSection, PricesSection
from fedjax_llm.runs.runfile_clouds import Link as Link
from fedjax_llm.runs.runfile_devices import DevicesSection
from fedjax_llm.runs.runfile_errors import problem
from fedjax_llm.runs.runfile_harmonise import (
    CloudHarmoniseSection,
    HarmoniseSection,
    check_harmonise,
)
from fedjax_llm.runs.runfile_partition import (
    DividingKeys,
    How,
    PartitionSection,
    check_partition,
    check_way,
)
from fedjax_llm.runs.runfile_plan import PlanSection, check_plan
from fedjax_llm.runs.runfile_privacy import PrivacySection, no_audit
from fedjax_llm.runs.runfile_schedule import (
    CompressionSection,
    ScheduleSection,
    check_compression,
    check_schedule,
)
from fedjax_llm.runs.runfile_secure import SecureSection, check_secure
from fedjax_llm.runs.runfile_types import (
    Count,
    MappingSection,
    NotNegative,
    Optimizer,
    Positive,
    Section,
    Text,
    Texts,
    check_sources,
)


class ModelSection(Section):
    """[model]: a model of the catalogue by `name`, or a Hugging Face folder by `path`.

    `dtype` is of activations and matrix products; adapters, optimisers, clipping and messages are
    float32. `weights` says how the frozen weights are kept, as `dtype` if left out: in "int8" or
    "nf4" only the kernels of the layers, the rest in `dtype`; "nf4-double" keeps the scales of nf4
    in eight bits.
    """

    name: str | None = Field(None, min_length=1)
    path: str | None = Field(None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["float32", "bfloat16", "int8", "nf4", "nf4-double"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            given = "neither" if self.name is None else "both"
            raise problem((), f"[model] takes either name or path, {given} given")
        return self


class AdapterSection(Section):
    """[adapter]: low-rank adapters. `targets` are shell-style patterns over projection names."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Texts = ("q_proj", "v_proj")


class TrainingSection(Section):
    """[training]: one client's local update. `batch_size` is the expected batch size.

    `proximal` is the mu of FedProx; `scaffold` adds control variates, and as much again to send.
    With `keep_optimizer` a client goes on with its optimiser's state from round to round; without,
    it begins anew, and memory does not grow with the clients by it. `unroll` layers are compiled in
    a row: faster on a CPU, and longer to compile.
    """

    local_steps: Count = 4
    batch_size: Count = 8
    microbatch: Count = 4
    sequence_length: Annotated[int, Field(ge=8)] = 256
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 1e-3
    keep_optimizer: bool = True
    proximal: NotNegative = 0.0
    scaffold: bool = False
    template: Literal["chat", "plain"] = "chat"
    system_prompt: str = ""
    packing: bool = False
    remat: bool = False
    unroll: Count = 1
    clients_at_once: Annotated[int | Literal["auto"], Field(union_mode="left_to_right")] = "auto"

    @model_validator(mode="after")
    def _clients_at_once(self) -> Self:
        if self.clients_at_once != "auto" and self.clients_at_once < 1:
            raise problem(("clients_at_once",), 'must be at least 1 or "auto"')
        return self


class EvaluationSection(Section):
    """[evaluation]: held-out loss every `every_rounds`, and one sample answer before and after.

    `aggregation_error` compares each round's result with the mean of the clients' products, which
    takes memory for every client's adapter. The run ends after the first evaluated round whose
    held-out loss, the mean over the clouds, is at most `target_loss` nats; with a privacy unit that
    end tells about held-out rows, which no epsilon covers.
    """

    every_rounds: Count = 1
    examples_per_cloud: Count = 32
    microbatch: Count = 8
    prompt: Text | None = None
    max_new_tokens: Count = 64
    aggregation_error: bool = True
    target_loss: Positive | None = None


class AuditSection(Section):
    """[audit]: after the last round, a twin of the run with `canaries` bounds epsilon from below.

    `rows` real rows of one cloud stand among them, at most. Sampled as thinly as in many runs,
    canaries show little: with `full` all take part in every step of the twin, whose epsilon is
    larger then, under the run's own clip and noise. `rounds` of the twin are the run's if left out.
    `inversion` attacks the text of one row from its gradient as well, without protection and with
    that of the run (units example, user).
    """

    canaries: Annotated[int, Field(ge=8)] = 500
    rows: Count = 64
    full: bool = False
    rounds: Count | None = None
    inversion: bool = False


class CheckpointSection(Section):
    """[checkpoint]: every round is checkpointed; the last `keep` are kept."""

    keep: Count = 2


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
    `rank` and `local_steps` are this cloud's own, at most those of [adapter] and [training];
    `weight` counts with [aggregation] weights = "public". With `clients` above 1 its training rows
    are divided by `partition` among so many clients (as [partition] divides a corpus by `how`, with
    the same keys), whose updates are summed inside the cloud before anything leaves it, unless the
    rule or combination reads each. `instance` and `region` are names of the catalogue
    (`fedjax-llm clouds`), which says what `link`, `compute` and `prices` leave out.
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
    weight: Positive = 1.0
    clients: Count = 1
    partition: How = "iid"


class RunFile(Section):
    """A whole run. Build it with `load`, or from Python with keyword arguments.

    `catalogue` is a file of figures of one's own, laid over those of the package; `server_region`
    is where the server stands, by which routes and prices of egress are looked up; `server_prices`
    correct or replace what the catalogue has of the server's own.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    secure: SecureSection = SecureSection()
    schedule: ScheduleSection = ScheduleSection()
    compression: CompressionSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    devices: DevicesSection = DevicesSection()
    attack: AttackSection | None = None
    audit: AuditSection | None = None
    harmonise: HarmoniseSection | None = None
    plan: PlanSection | None = None
    catalogue: Text | None = None
    server_region: Text | None = None
    server_prices: PricesSection | None = None
    partition: PartitionSection | None = None
    clouds: Annotated[tuple[Cloud, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [cloud.name for cloud in self.clouds]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise problem(("clouds", index, "name"), "must be unique among the clouds")
        check_aggregation(self.aggregation, self.training.local_steps, self.secure.sum)
        divided = any(cloud.clients > 1 for cloud in self.clouds)
        check_attack(self.attack, names, self.privacy.unit, divided)
        self._check_unread()
        check_schedule(self.schedule, len(names))
        check_compression(self.compression, self.secure.bits)
        check_partition(
            self.partition,
            data=[cloud.data is not None for cloud in self.clouds],
            speed=[cloud.compute is not None or bool(cloud.instance) for cloud in self.clouds],
            harmonise=[
                own is not None and bool(own.model_fields_set - {"tokenizer"})
                for own in (cloud.harmonise for cloud in self.clouds)
            ],
            unit=self.privacy.unit,
        )
        check_harmonise(
            self.harmonise, [cloud.harmonise for cloud in self.clouds], self.privacy.unit
        )
        if self.audit is not None and (why := no_audit(self.privacy)) is not None:
            raise problem(("audit",), f"has nothing to audit: {why}", got=False)
        in_rounds = self.schedule.name == "synchronous" and self.compression is None
        if self.audit is not None and self.privacy.unit == "client" and not in_rounds:
            raise problem(
                ("audit",),
                "inserts messages that are sent whole into synchronous rounds; leave out "
                "[compression] and [schedule], or audit unit example",
                got=False,
            )
        if self.audit is not None and self.schedule.name not in ("synchronous", "deadline"):
            raise problem(
                ("audit",),
                f'counts rounds, and clouds of schedule "{self.schedule.name}" look at their data '
                "more often; audit the run with schedule synchronous",
                got=False,
            )
        for index, cloud in enumerate(self.clouds):
            for key, own, whole, section in (
                ("rank", cloud.rank, self.adapter.rank, "adapter"),
                ("local_steps", cloud.local_steps, self.training.local_steps, "training"),
            ):
                if own is not None and own > whole:
                    raise problem(
                        ("clouds", index, key), f"must be at most {whole}, [{section}] {key}"
                    )
        privacy = self.privacy
        check_plan(self.plan, self.evaluation.target_loss, privacy.unit != "none")
        check_secure(self.secure, len(names), privacy.unit, privacy.noise_multiplier)
        return self

    def _check_unread(self) -> None:
        """Refuses settings of clouds and training that nothing would read."""
        public = self.aggregation.weights == "public"
        if public and all(cloud.weight == 1 for cloud in self.clouds):
            raise problem(
                ("aggregation", "weights"), 'needs a weight in some [[clouds]]; or use "uniform"'
            )
        for index, cloud in enumerate(self.clouds):
            check_way(("clouds", index), "partition", cloud.partition, cloud)
            alone = (cloud.clients == 1, "goes with clients above 1")
            idle = {
                "weight": (not public, 'goes with [aggregation] weights = "public"'),
                **dict.fromkeys(("partition", *DividingKeys.model_fields), alone),
            }
            for key, (unread, what) in idle.items():
                if unread and getattr(cloud, key) != Cloud.model_fields[key].default:
                    raise problem(("clouds", index, key), f"{what}; remove it", got=False)
        if self.aggregation.exchange == "gradients":
            for key in ("optimizer", "learning_rate", "proximal"):
                default = TrainingSection.model_fields[key].default
                if getattr(self.training, key) != default:
                    raise problem(
                        ("training", key),
                        'has no effect with [aggregation] exchange = "gradients", where the server '
                        "takes the step; remove it and set server_optimizer and its rate",
                        got=False,
                    )
        if self.training.scaffold and self.secure.selective is not None:
            raise problem(
                ("training", "scaffold"),
                "sends control variates, which [secure.selective] has no names for; remove one",
                got=False,
            )
