"""From what a federation is asked for to the parts that its programs are built from, all checked.

Nothing is compiled, no key is made and nothing is put on a device here.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule, NormalisedMean, ServerState
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.clouds.schedules import Decoupled, Schedule, Streaming, Synchronous
from fedjax_llm.errors import UserError
from fedjax_llm.federation.compressor import Compression, Compressor
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.link_promises import (
    Promise,
    check_compression,
    check_schedule,
    in_fragments,
)
from fedjax_llm.federation.message import MessageCodec, Upload, WeightCodec, fitting_bits
from fedjax_llm.federation.objective import rows_loss
from fedjax_llm.federation.promises import (
    Combination,
    check_combination,
    check_correlation,
    check_integer,
    check_plan,
    check_selective,
    weight_kinds,
)
from fedjax_llm.federation.recipe import Attackers, Recipe
from fedjax_llm.federation.replicas import Replicas
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.shares import check_online, mechanism_and_bits, table_of
from fedjax_llm.federation.sums import Plain, SumMode, opens
from fedjax_llm.federation.wire_sizes import WireSizes, packed_sizes
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Model
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.privacy.integer_noise import NoiseTable
from fedjax_llm.training import LocalTraining

PyTree = Any


@dataclass(frozen=True, eq=False)
class Settings:
    """What a federation is asked for beside its model and its clients; see `Federation`."""

    lora: LoraConfig
    training: LocalTraining
    rule: AggregationRule
    plan: PrivacyPlan
    sum_mode: SumMode
    schedule: Schedule = field(default_factory=Synchronous)
    compression: Compression | None = None
    combine: Combination | None = None
    update_bound: float = 1.0
    value_bits: int | None = None
    attackers: Attackers | None = None
    measure_error: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False
    unroll: int = 1

    @property
    def shortened(self) -> Compression | None:
        """How messages are shortened, fragments of the schedule included."""
        return in_fragments(self.compression, self.schedule)

    @property
    def robust(self) -> Any:
        """The combination, if it is a robust one."""
        return None if isinstance(self.combine, NormalisedMean) else self.combine

    @property
    def max_norm(self) -> float:
        """The largest l2 norm of a message."""
        return self.plan.clip_norm if self.plan.unit == "client" else self.update_bound


@dataclass(frozen=True, eq=False)
class Assembly:
    """The parts of a federation.

    Attributes:
        recipe: of its programs.
        codecs: fixed point of the messages, by phase and stage.
        sizes: bytes where they are not counted as they are sent.
        groups: of each cloud, where the sums of groups stay apart; None for one sum.
        server: shapes of the server's state.
    """

    recipe: Recipe
    codecs: tuple[tuple[MessageCodec, ...], ...]
    sizes: WireSizes
    groups: tuple[int, ...] | None
    server: ServerState


def assemble(model: Model, settings: Settings, roster: Roster, layout: CohortLayout) -> Assembly:
    """Checks the settings against each other and makes the parts.

    Args:
        model: the frozen base; shapes are enough.
        settings: what is asked for.
        roster: the clients.
        layout: where they are computed.

    Raises:
        UserError, Refused: as `Federation`.
    """
    _check(settings, roster)
    rule, count = settings.rule, len(roster.participants)
    groups = None
    robust = settings.robust
    if isinstance(robust, GroupRobust):
        robust.check(len(roster.clouds))
        groups = tuple(int(group) for group in robust.assign(len(roster.clouds)))
    elif robust is not None:
        robust.check(count)
    server = jax.eval_shape(
        lambda key: rule.init(init_adapter(model.config, settings.lora, key)), jax.random.key(0)
    )
    recipe = _recipe(model, settings, roster, layout, groups, server)
    if recipe.sums_weights and count > WeightCodec.MOST_CLIENTS:
        raise UserError(
            f"weights that follow from results add up for at most {WeightCodec.MOST_CLIENTS} "
            f"clients, there are {count}; use weights that are known beforehand"
        )
    bits, noise = _bits_and_noise(model, settings, roster)
    codecs = tuple(
        _codecs(settings, recipe, server, phase, count, bits, noise)
        for phase in range(len(rule.phases))
    )
    sizes = WireSizes(
        rule,
        server,
        roster.ranks,
        roster.cloud_K,
        settings.training.drift.control,
        recipe.sums_weights,
        recipe.reads_messages,
        recipe.adaptive is not None,
        packed_sizes(recipe.compressor, codecs[0], count) if recipe.compressor else None,
    )
    return Assembly(recipe, codecs, sizes, groups, server)


def _check(settings: Settings, roster: Roster) -> None:
    """Refuses settings that contradict each other, or what the plan accounts for."""
    rule, plan, training = settings.rule, settings.plan, settings.training
    check_combination(
        rule=rule,
        unit=plan.unit,
        drift=training.drift,
        hidden=not isinstance(settings.sum_mode, Plain),
        combine=settings.combine,
        bound=settings.max_norm,
        weighs=roster.weighs,
        normalises=roster.weights.normalises_steps,
        by_loss=roster.by_loss is not None,
        attack=settings.attackers.attack if settings.attackers else None,
    )
    check_plan(plan, training, roster.participants, weight_kinds(rule, roster.kind))
    check_correlation(plan, rule)
    check_selective(plan, settings.sum_mode, rule)
    settings.schedule.check(len(roster.clouds))
    promise = Promise.of(plan)
    check_schedule(
        settings.schedule,
        promise,
        rule=rule,
        opens=opens(settings.sum_mode),
        clouds=len(roster.clouds),
        drift=training.drift,
        combine=settings.combine,
        by_loss=roster.by_loss is not None,
        normalises=roster.weights.normalises_steps,
        attacked=settings.attackers is not None,
        offline=any(participant.offline_rounds for participant in roster.participants),
    )
    if settings.shortened is not None:
        check_compression(
            settings.shortened,
            promise,
            rule=rule,
            combined=settings.combine is not None,
            control=training.drift.control,
        )


def _recipe(
    model: Model,
    settings: Settings,
    roster: Roster,
    layout: CohortLayout,
    groups: tuple[int, ...] | None,
    server: ServerState,
) -> Recipe:
    rule, plan, schedule = settings.rule, settings.plan, settings.schedule
    adaptive = plan.adaptive if plan.unit == "client" else None
    noise_stddev = plan.noise_stddev if plan.trust == "central" else 0.0
    if adaptive is not None:
        # Messages are divided by the clip norm of their round.
        noise_stddev /= plan.clip_norm
    replicas = compressor = None
    if isinstance(schedule, Streaming | Decoupled):
        replicas = Replicas(schedule.mixing, schedule.fragments)
    if settings.shortened is not None:
        like = Upload(rule.messages(server, 0)[0][0])
        kept = replicas.mixing if replicas else None
        compressor = Compressor(settings.shortened, like, kept)
        if not schedule.timely:
            compressor.check_ahead(schedule.name)
    dtype, remat, unroll = settings.dtype, settings.remat, settings.unroll
    return Recipe(
        layout=layout,
        training=settings.training,
        rule=rule,
        rows_loss=lambda base, adapter, rows: rows_loss(
            model, base, layout.cut_adapter(adapter), rows, dtype, remat, unroll
        ),
        by_loss=roster.by_loss,
        normalised=settings.combine if isinstance(settings.combine, NormalisedMean) else None,
        combine=settings.robust,
        groups=groups and tuple(groups[cloud] for cloud in roster.cloud_K),
        clouds=roster.cloud_K,
        attackers=settings.attackers,
        server_noise_stddev=noise_stddev,
        server_noise=plan.correlation if plan.trust == "central" else None,
        adaptive=adaptive,
        expected=sum(plan.expected_sizes)
        if plan.unit == "client"
        else float(len(roster.participants)),
        # A sum of weights that follow from private data would be one more release.
        sums_weights=plan.unit != "client"
        and (roster.by_loss is not None or rule.weighs_by_result),
        measures_error=settings.measure_error
        and schedule.timely
        and settings.combine is None
        and not rule.kept
        and not roster.weights.normalises_steps,
        ranks_differ=any(own != settings.lora.rank for own in roster.ranks),
        sampled=plan.unit == "client" and (plan.sampler.kind != "full" or plan.sampler.period > 1),
        steps_differ=bool((roster.steps_K != settings.training.steps).any()),
        batches_differ=bool((roster.batch_K != settings.training.batch_size).any()),
        replicas=replicas,
        compressor=compressor,
    )


def _bits_and_noise(
    model: Model, settings: Settings, roster: Roster
) -> tuple[int, NoiseTable | None]:
    """Bits of an integer, and what integer noise is drawn from."""
    plan, count = settings.plan, len(roster.participants)
    if plan.integer is None:
        return fitting_bits(settings.value_bits, count), None
    done, bits = mechanism_and_bits(
        model.config,
        settings.lora,
        settings.rule,
        plan.integer.shares,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        control=settings.training.drift.control,
        bits=settings.value_bits,
    )
    check_integer(plan, done, roster.participants, settings.sum_mode)
    offline = set[int]().union(*(own.offline_rounds for own in roster.participants))
    for number in sorted(offline):
        if number <= plan.allowed_rounds:
            check_online(done, int(roster.online(number).sum()), number)
    return bits, table_of(done, plan.noise_multiplier)


def _codecs(
    settings: Settings,
    recipe: Recipe,
    server: ServerState,
    phase: int,
    clients: int,
    bits: int,
    noise: NoiseTable | None,
) -> tuple[MessageCodec, ...]:
    """The fixed point of each stage's message."""
    rule, control = recipe.rule, recipe.training.drift.control
    compressor, counts = recipe.compressor, recipe.adaptive is not None
    # With an adaptive clip norm messages are in its unit.
    max_norm = 1.0 if counts else settings.max_norm
    if compressor is not None:
        # `check_compression` refuses it: compressed messages carry none.
        assert noise is None
        return tuple(
            MessageCodec.for_tree(
                tree,
                max_norm=max_norm,
                bits=bits,
                clients=clients,
                counts=counts,
                reach=compressor.bound(max_norm, stage, bits, clients),
                stochastic=compressor.compression.rounding == "stochastic",
                strict=settings.plan.unit == "client",
            )
            for stage, tree in enumerate(compressor.shapes)
        )
    return tuple(
        MessageCodec.for_tree(
            Upload(message, rule.trainable(server, phase) if control and stage == 0 else ()),
            max_norm=max_norm,
            bits=bits,
            clients=clients,
            noise=noise,
            counts=counts,
        )
        for stage, message in enumerate(rule.messages(server, phase)[0])
    )
