"""The run file as one frozen, typed object of all sections, and what in them must fit together."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections.aggregation import (
    AggregationSection,
    AttackSection,
    check_aggregation,
    check_attack,
)
from fedjax_llm.runs.sections.clouds import Cloud, PricesSection
from fedjax_llm.runs.sections.devices import DevicesSection
from fedjax_llm.runs.sections.evaluation import AuditSection, EvaluationSection
from fedjax_llm.runs.sections.harmonise import HarmoniseSection, check_harmonise
from fedjax_llm.runs.sections.partition import (
    DividingKeys,
    PartitionSection,
    check_partition,
    check_way,
)
from fedjax_llm.runs.sections.plan import PlanSection, check_plan
from fedjax_llm.runs.sections.privacy import PrivacySection, no_audit
from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.schedule import (
    CompressionSection,
    ScheduleSection,
    check_compression,
    check_schedule,
)
from fedjax_llm.runs.sections.secure import SecureSection, check_secure
from fedjax_llm.runs.sections.training import AdapterSection, ModelSection, TrainingSection
from fedjax_llm.runs.sections.types import Count, Section, Text


class CheckpointSection(Section):
    """[checkpoint]: every round is checkpointed; the last `keep` are kept."""

    keep: Count = 2


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
        self._check_audit()
        for index, cloud in enumerate(self.clouds):
            for key, own, whole, section in (
                ("rank", cloud.rank, self.adapter.rank, "adapter"),
                ("local_steps", cloud.local_steps, self.training.local_steps, "training"),
                ("batch_size", cloud.batch_size, self.training.batch_size, "training"),
            ):
                if own is not None and own > whole:
                    raise problem(
                        ("clouds", index, key), f"must be at most {whole}, [{section}] {key}"
                    )
        privacy = self.privacy
        check_plan(self.plan, self.evaluation.target_loss, privacy.unit != "none")
        check_secure(self.secure, len(names), privacy.unit, privacy.noise_multiplier)
        return self

    def _check_audit(self) -> None:
        """Refuses an audit of what has no noise, or of what a twin of the run cannot show."""
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
