"""The federation: clouds with their data around one frozen base model.

`Federation` holds what does not change (the base, the data on the devices, the compiled programs,
the keys of the encrypted sum); `FederationState` is a pytree that holds all that does. A round is
`state -> (state, report)`.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import AggregationRule, LossWeights, NormalisedMean, Weights
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.cohort import ClientInputs, Local
from fedjax_llm.federation.evaluation import HeldOut
from fedjax_llm.federation.exchange import HiddenSums, Ledger, OnStage
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.message import (
    EncodedMessage,
    MessageCodec,
    Upload,
    WeightCodec,
    fitting_bits,
)
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.federation.programs import Applied, Attackers, Recipe, RoundPrograms, Sums
from fedjax_llm.federation.promises import (
    Combination,
    check_combination,
    check_plan,
    check_selective,
    weight_kind,
)
from fedjax_llm.federation.reports import RoundReport, report
from fedjax_llm.federation.state import FederationState, adapter_of, init_state
from fedjax_llm.federation.sums import Plain, Selective, SumMode
from fedjax_llm.federation.tables import (
    Participant,
    check_participants,
    client_tables,
    clouds_of,
)
from fedjax_llm.federation.wire_sizes import WireSizes
from fedjax_llm.lora import Adapter, LoraConfig, add_dense, init_adapter
from fedjax_llm.models import Model, loss
from fedjax_llm.privacy import PrivacyPlan, poisson_sample
from fedjax_llm.training import LocalTraining

PyTree = Any


class Federation:
    """Clouds that fine-tune one model together.

    Args:
        model: the frozen base, its configuration and tokenizer.
        participants: the clients, in the order that addresses their randomness. Each is a cloud of
            its own, or several share one: then their messages are summed inside it, in the plain,
            and only that sum leaves it ("hybrid aggregation", arXiv 2503.12226).
        lora: rank, alpha and targets of the adapter.
        training: one client's local update.
        rule: how messages become the next adapter.
        plan: what is promised about privacy; checked against what is really done.
        sum_mode: how messages are added.
        combine: directions instead of updates, or a robust combination; the mean if None.
        update_bound: largest l2 norm of one client's message; longer ones are shortened to it.
            With privacy unit `client` the plan's clip norm takes its place.
        value_bits: bits of one coordinate on the wire; `fitting_bits` chooses by default.
        weights: each client's weight in the mean: known beforehand (`Weights`, or numbers that
            count as depending on data), or by loss; uniform if None.
        attackers: clients that send something else than what they trained, to try a defence.
        measure_error: whether each round's report tells the aggregation error.
        seed: of all simulated randomness.
        dtype: of activations.
        remat: whether activations are recomputed in the backward pass instead of kept.
        evaluation_microbatch: evaluation rows in memory at once on a device.
        clients_at_once: clients in one vmap; chosen by platform if None.
        devices: where to run; all devices by default.

    Raises:
        UserError: no clouds, two of one name, bits or weights that do not fit, parts that have no
            meaning together.
        Refused: what is done and what the plan accounts for differ; a rule that must see single
            messages under a sum that hides them; selective encryption without noise in every
            cloud; a threshold that hides nothing.
    """

    def __init__(
        self,
        model: Model,
        participants: Sequence[Participant],
        *,
        lora: LoraConfig,
        training: LocalTraining,
        rule: AggregationRule,
        plan: PrivacyPlan,
        sum_mode: SumMode,
        combine: Combination | None = None,
        update_bound: float = 1.0,
        value_bits: int | None = None,
        weights: Weights | LossWeights | Sequence[float] | None = None,
        attackers: Attackers | None = None,
        measure_error: bool = True,
        seed: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        evaluation_microbatch: int = 8,
        clients_at_once: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        check_participants(participants, lora.rank, training.steps, rule.facts.ranks)
        self.model = model
        self.participants = tuple(participants)
        self.lora = lora
        self.plan = plan
        self.sum_mode = sum_mode
        self.rule = rule
        self._training = training
        self._seed = seed_key(seed)
        self.clouds, self._cloud_K = clouds_of(participants)
        count = len(participants)
        by_loss = weights if isinstance(weights, LossWeights) else None
        self._weights = (
            weights
            if isinstance(weights, Weights)
            else Weights.of(None if isinstance(weights, LossWeights) else weights, count)
        )
        self._by_loss = by_loss
        self._combine = None if isinstance(combine, NormalisedMean) else combine
        check_combination(
            rule=rule,
            unit=plan.unit,
            drift=training.drift,
            hidden=not isinstance(sum_mode, Plain),
            combine=combine,
            weighs=by_loss is not None or bool(np.any(self._weights.contributions_K != 1)),
        )
        check_plan(plan, training, self.participants, weight_kind(rule, self._weights, by_loss))
        check_selective(plan, sum_mode)
        self.layout = CohortLayout.over(count, clients_at_once, devices)

        robust = None if isinstance(combine, NormalisedMean) else combine
        cloud_groups = None
        if isinstance(robust, GroupRobust):
            robust.check(len(self.clouds))
            cloud_groups = tuple(int(group) for group in robust.assign(len(self.clouds)))
        elif robust is not None:
            robust.check(count)
        self._recipe = Recipe(
            layout=self.layout,
            training=training,
            rule=rule,
            row_loss=lambda base, adapter, row: row_loss(model, base, adapter, row, dtype, remat),
            by_loss=by_loss,
            normalised=combine if isinstance(combine, NormalisedMean) else None,
            combine=robust,
            groups=cloud_groups and tuple(cloud_groups[cloud] for cloud in self._cloud_K),
            clouds=self._cloud_K,
            attackers=attackers,
            server_noise_stddev=plan.noise_stddev if plan.unit == "client" else 0.0,
            # A sum of weights that follow from private data would be one more release.
            sums_weights=plan.unit != "client" and (by_loss is not None or rule.weighs_by_result),
            measures_error=measure_error
            and robust is None
            and not isinstance(combine, NormalisedMean)
            and not rule.kept
            and not self._weights.normalises_steps,
        )
        shapes = jax.eval_shape(
            lambda key: rule.init(init_adapter(model.config, lora, key)), self._seed
        )
        bits = fitting_bits(value_bits, count)
        max_norm = plan.clip_norm if plan.unit == "client" else update_bound
        self._programs = tuple(
            RoundPrograms(self._recipe, phase, self._codecs(shapes, phase, max_norm, bits))
            for phase in range(len(rule.phases))
        )
        ranks = tuple(lora.rank if p.rank is None else p.rank for p in participants)
        self._sizes = WireSizes(
            rule,
            shapes,
            ranks,
            self._cloud_K,
            training.drift.control,
            self._recipe.sums_weights,
            self._recipe.reads_messages,
        )
        self._base = self.layout.replicate(model.base)
        self._ranks_K = np.array(ranks, np.int32)
        self._steps_K = np.array(
            [training.steps if p.local_steps is None else p.local_steps for p in participants],
            np.int32,
        )
        self._before_K = self._weights.contributions_K
        if by_loss is not None:
            self._before_K = by_loss.beforehand(
                [p.rows for p in participants], [p.cloud.link.up_mbps for p in participants]
            )
        self._tables = self.layout.shard(client_tables(self.participants, training))
        self._held_out = HeldOut(
            self.layout,
            [participant.evaluation for participant in participants],
            lambda base, adapter, batch: loss(model.config, base, adapter, batch, dtype=dtype),
            evaluation_microbatch,
        )
        self._hidden: HiddenSums | None = None
        if not isinstance(sum_mode, Plain):
            self._hidden = HiddenSums(sum_mode, self.names, cloud_groups, self._lengths())

    def _codecs(
        self, server: Any, phase: int, max_norm: float, bits: int
    ) -> tuple[MessageCodec, ...]:
        """The fixed point of each stage's message."""
        rule, control = self.rule, self._training.drift.control
        found = []
        for stage, message in enumerate(rule.messages(server, phase)[0]):
            extra = rule.trainable(server, phase) if control and stage == 0 else ()
            tree = Upload(message, extra)
            found.append(
                MessageCodec.for_tree(
                    tree, max_norm=max_norm, bits=bits, clients=len(self.participants)
                )
            )
        return tuple(found)

    def _length(self, codec: MessageCodec | None) -> tuple[int, int]:
        """Integers that a cloud sends in a sum, and their bound; None is the sum of weights."""
        most = max(self._cloud_K.count(cloud) for cloud in range(len(self.clouds)))
        if codec is None:
            return WeightCodec.LIMBS, most * WeightCodec.MAX_INT
        return codec.size, most * codec.fixed_point.max_int

    def _lengths(self) -> list[tuple[int, int]]:
        codecs = [codec for programs in self._programs for codec in programs.codecs]
        return [self._length(codec) for codec in codecs] + (
            [self._length(None)] if self._recipe.sums_weights else []
        )

    @property
    def parameters(self) -> int:
        """Numbers that each cloud sends in a round, the most of any."""
        return max(sum(codec.size for codec in programs.codecs) for programs in self._programs)

    @property
    def names(self) -> tuple[str, ...]:
        """The clouds' names, in order."""
        return tuple(cloud.name for cloud in self.clouds)

    @property
    def client_names(self) -> tuple[str, ...]:
        """The clients' names, in order; those of the clouds where each has one client."""
        return tuple(participant.name for participant in self.participants)

    def statement(self) -> str:
        """Who can decrypt what; a run prints it before it starts."""
        if self._hidden is None:
            return Plain().statement()
        words = self._hidden.statement()
        if len(self.participants) > len(self.clouds):
            words += (
                ". Clients of one cloud are summed inside it in the plain: their own cloud sees "
                "their updates, nobody else does"
            )
        if self._recipe.sums_weights:
            words += ". The sum of the clients' weights is opened first, and all see it"
        if isinstance(self.sum_mode, Selective):
            words += (
                ". Each cloud adds the whole noise itself, so that the epsilon per example holds "
                "for what it sends in the clear as well; it hides one example, not what a cloud's "
                "examples have in common, which the clear part shows for each cloud by itself"
            )
        return words

    @property
    def encrypted_fraction(self) -> float:
        """Parameters that leave a cloud encrypted or masked, over all that it sends."""
        if isinstance(self.sum_mode, Selective):
            return self.sum_mode.selection.fraction
        return 0.0 if self._hidden is None else 1.0

    def init(self) -> FederationState:
        """Returns the state before the first round."""
        return init_state(
            self.model.config,
            self.lora,
            self.rule,
            self._training,
            self._seed,
            len(self.participants),
            self._combine,
        )

    def model_of(self, state: FederationState, cloud: str | None = None) -> tuple[PyTree, Adapter]:
        """The base and the adapter that a cloud's model runs with, to evaluate or generate.

        Args:
            state: after any round.
            cloud: matters for rules with personal adapters; then its first client's. The global
                model if None.

        Raises:
            UserError: no such cloud.
        """
        client = None
        if cloud is not None:
            if cloud not in self.names:
                raise UserError(f"no cloud {cloud!r}; there are {', '.join(self.names)}")
            client = self._cloud_K.index(self.names.index(cloud))
        residual = state.server.residual
        base = add_dense(self.model.base, residual) if residual else self.model.base
        return base, adapter_of(self.rule, state, client)

    def evaluate(self, state: FederationState) -> dict[str, float]:
        """Returns each cloud's held-out loss in nats per answer token."""
        residual = state.server.residual
        base = self._base
        if residual:
            base = _with_residual(base, self.layout.replicate(residual))
        clients = range(len(self.participants)) if self.rule.kept else (None,)
        found = [
            self._held_out.sums(base, self.layout.replicate(adapter_of(self.rule, state, client)))
            for client in clients
        ]
        losses = {}
        for cloud, name in enumerate(self.names):
            members = [k for k, own in enumerate(self._cloud_K) if own == cloud]
            # A client with an adapter of its own is measured with that one.
            sums = [found[k if self.rule.kept else 0][k] for k in members]
            tokens = sum(count for _, count in sums)
            losses[name] = sum(nll for nll, _ in sums) / max(tokens, 1)
        return losses

    def rounds(
        self, state: FederationState, count: int
    ) -> Iterator[tuple[FederationState, RoundReport]]:
        """Yields the state and report after each of `count` rounds."""
        for _ in range(count):
            state, done = self.run_round(state)
            yield state, done

    def run_round(
        self, state: FederationState, on_stage: OnStage = lambda stage: None
    ) -> tuple[FederationState, RoundReport]:
        """Runs one round: broadcast, local training, sum, server step.

        Args:
            state: after the round before; it stays valid.
            on_stage: called with the name of each stage as it begins.

        Raises:
            UserError: no cloud is online, or training diverged in a client. With privacy unit
                `client` such a client sends zeros and is counted in the report instead.
            Refused: fewer clouds are online than can decrypt, or the privacy plan accounts for no
                more rounds. The state is unchanged.
        """
        number = int(state.round) + 1
        if self.plan.unit != "none" and number > self.plan.rounds:
            raise Refused(
                f"round {number}: the privacy plan accounts for {self.plan.rounds} rounds; "
                "plan more, at a larger epsilon"
            )
        online_K = np.array([number not in p.offline_rounds for p in self.participants], bool)
        if not online_K.any():
            raise UserError(f"round {number}: no cloud is online; resume when one is")
        online = [
            name
            for cloud, name in enumerate(self.names)
            if online_K[np.array(self._cloud_K) == cloud].any()
        ]
        if self._hidden is not None:
            self._hidden.check(online)
        phase = self.rule.phase(number)
        programs = self._programs[phase]
        clients = self._client_inputs(state, online_K & self._selected(number))
        inverse = jnp.float32(1 / self._divisor(online_K))
        ledger = Ledger.of(self.names)
        if self._hidden is None:
            on_stage("train")
            run = functools.partial(self._plain_round, programs)
        else:
            run = functools.partial(
                self._hidden_round, programs, self._hidden, online, ledger, on_stage
            )
        applied, local, message = run(state, clients, inverse, number, ledger)
        for cloud, name in enumerate(self.names):
            if self._hidden is None:
                ledger.sent[name] += self._sizes.up(phase, cloud, online_K.tolist())
            ledger.received[name] += self._sizes.down(phase, cloud, online_K.tolist())
        new = applied.state
        new_state = FederationState(
            jnp.int32(number),
            *_on_first_device((new.server, _own(local.state, len(self.participants)))),
            *_on_first_device((new.control, new.combine)),
        )
        return new_state, report(
            number=number,
            participants=self.participants,
            clouds=self.clouds,
            cloud_K=self._cloud_K,
            online=online,
            metrics=jax.device_get(local.metrics),
            norms_K=np.asarray(message.norm)[: len(self.participants)],
            private=self._training.privacy is not None,
            max_norm=programs.codecs[0].max_norm,
            update_norm=float(applied.update_norm),
            error=float(applied.error),
            ledger=ledger,
        )

    def _plain_round(
        self,
        programs: RoundPrograms,
        state: FederationState,
        clients: ClientInputs,
        inverse: jax.Array,
        number: int,
        ledger: Ledger,
    ) -> tuple[Applied, Local, EncodedMessage]:
        """All of a round as one program."""
        started = time.perf_counter()
        where = (self._seed, jnp.int32(number))
        applied, local, message, limbs_Kx4 = jax.block_until_ready(
            programs.round(
                self._base, self.layout.replicate(state.globals), clients, inverse, *where
            )
        )
        self._check_finite(message, number)
        if self._recipe.sums_weights:
            self._check_weights(limbs_Kx4, number)
        ledger.seconds["train"] = time.perf_counter() - started
        return applied, local, message

    def _hidden_round(
        self,
        programs: RoundPrograms,
        hidden: HiddenSums,
        online: list[str],
        ledger: Ledger,
        on_stage: OnStage,
        state: FederationState,
        clients: ClientInputs,
        inverse: jax.Array,
        number: int,
        _: Ledger,
    ) -> tuple[Applied, Local, EncodedMessage]:
        """A round whose sums are taken between the clouds."""
        shared = self.layout.replicate(state.globals)
        where = (self._seed, jnp.int32(number))
        sums_a_round = programs.stages + self._recipe.sums_weights
        numbers = iter(range((number - 1) * sums_a_round + 1, number * sums_a_round + 1))

        def total(ints_KxP: jax.Array, codec: MessageCodec | None) -> jax.Array:
            ints_CxP = programs.by_cloud(ints_KxP)
            length = self._length(codec)
            found = hidden.total(length, ints_CxP, online, next(numbers), ledger, on_stage)
            return jnp.asarray(found, jnp.int32)

        on_stage("train")
        started = time.perf_counter()
        sums = Sums()
        if self._recipe.sums_weights:
            local = jax.block_until_ready(programs.train(self._base, shared, clients, *where))
            limbs_Kx4 = programs.weigh(shared, clients, local, *where)
            self._check_weights(limbs_Kx4, number)
            ledger.seconds["train"] = time.perf_counter() - started
            sums = Sums(inverse_weight=programs.inverse_weight(total(limbs_Kx4, None)))
            message = programs.send(0, shared, clients, local, sums, *where)
        else:
            local, message = jax.block_until_ready(
                programs.train_and_send(self._base, shared, clients, *where)
            )
            ledger.seconds["train"] = time.perf_counter() - started
        self._check_finite(message, number)
        first = message
        for stage, codec in enumerate(programs.codecs[:-1]):
            public = programs.between(stage, total(message.ints_P, codec), inverse, shared, *where)
            sums = sums._replace(public=public)
            message = programs.send(stage + 1, shared, clients, local, sums, *where)
        summed = total(message.ints_P, programs.codecs[-1])
        started = time.perf_counter()
        applied = jax.block_until_ready(
            programs.apply(summed, inverse, shared, clients, local, sums, *where)
        )
        ledger.seconds["apply"] = time.perf_counter() - started
        return applied, local, first

    def _selected(self, number: int) -> np.ndarray:
        """Which clients take part: all, or a Poisson sample when the unit is the client."""
        count = len(self.participants)
        if self.plan.unit != "client" or self.plan.sampler.kind == "full":
            return np.ones(count, dtype=bool)
        key = key_for(self._seed, Purpose.CLIENT_SAMPLING, number)
        indices_K, chosen = poisson_sample(key, count, self.plan.sampler.rates[0], count)
        selected_K = np.zeros(count, dtype=bool)
        selected_K[np.asarray(indices_K)[: int(chosen)]] = True
        return selected_K

    def _divisor(self, online_K: np.ndarray) -> float:
        """The public number that turns the sum into a mean."""
        if self._recipe.sums_weights:
            return 1.0  # the shares add up to one
        divisor = self._weights.divisor(online_K)
        if self._by_loss is not None:
            divisor = float(online_K.sum()) * self._by_loss.ordinary
        if self.plan.unit == "client":
            # The expected number, not the realised one, which the guarantee does not cover.
            divisor *= self.plan.sampler.rates[0]
        return divisor

    def _client_inputs(self, state: FederationState, selected_K: np.ndarray) -> ClientInputs:
        count = len(self.participants)
        place, weight, participates, rank, steps = self.layout.shard(
            (
                np.arange(count, dtype=np.int32),
                self._before_K,
                selected_K,
                self._ranks_K,
                self._steps_K,
            )
        )
        own = self.layout.shard(jax.device_get(state.clients))
        return ClientInputs(place, self._tables, own, weight, participates, rank, steps)

    def _check_finite(self, message: EncodedMessage, number: int) -> None:
        if self.plan.unit == "client":
            # Stopping here, by name, would release what the unit hides: the codec sends zeros. With
            # unit `example` an update follows from noised sums alone, and so does this error.
            return
        norms_K = np.asarray(message.norm)[: len(self.participants)]
        for participant, norm in zip(self.participants, norms_K, strict=True):
            if not math.isfinite(norm):
                what = "client" if participant.client else "cloud"
                raise UserError(
                    f"round {number}: the update of {what} {participant.name!r} is not finite, "
                    "training diverged; lower [training] learning_rate (the last round's state is "
                    "kept)"
                )

    def _check_weights(self, limbs_Kx4: jax.Array, number: int) -> None:
        limbs = np.asarray(limbs_Kx4)[: len(self.participants)]
        WeightCodec.check(limbs, self.client_names, number)


_with_residual = jax.jit(add_dense)


def _own(states: PyTree, count: int) -> PyTree:
    """The clients' states without padding."""
    return jax.tree.map(lambda leaf: leaf[:count], states)


def _on_first_device(tree: PyTree) -> PyTree:
    """Takes one copy of a replicated tree, so that a state does not depend on the devices."""
    return jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), tree)
