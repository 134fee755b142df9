"""The federation: clouds with their data around one frozen base model.

`Federation` holds what does not change (the base, the data on the devices, the compiled programs,
the keys of the encrypted sum); `FederationState` is a pytree that holds all that does. A round is
`state -> (state, report)`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import AggregationRule, LossWeights, NormalisedMean, Weights
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.evaluation import HeldOut
from fedjax_llm.federation.exchange import Codec, HiddenSums, Ledger, OnStage
from fedjax_llm.federation.keys import Seeds, seed_key
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.message import MessageCodec, Upload, WeightCodec, fitting_bits
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.federation.programs import RoundPrograms
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
from fedjax_llm.federation.reports import RoundReport, report
from fedjax_llm.federation.roads import BeforeOpening, Road
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.shares import check_online, mechanism_and_bits, table_of
from fedjax_llm.federation.state import FederationState, adapter_of, init_state
from fedjax_llm.federation.sums import Plain, Selective, SumMode
from fedjax_llm.federation.tables import Participant, check_participants
from fedjax_llm.federation.wire_sizes import WireSizes
from fedjax_llm.lora import Adapter, LoraConfig, add_dense, init_adapter
from fedjax_llm.models import Model, loss
from fedjax_llm.privacy import PrivacyPlan, is_secret
from fedjax_llm.privacy.integer_noise import NoiseTable
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
        noise_key: of noise and samples, from `privacy.secret_key`; from the seed if None.
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
        noise_key: jax.Array | None = None,
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
        public = seed_key(seed)
        self._seed = public if noise_key is None else Seeds(public, noise_key)
        if noise_key is not None and not is_secret(noise_key):
            raise Refused(
                "the noise key is one of JAX's own, of 64 bits or fewer; make it with "
                "privacy.secret_key"
            )
        if (plan.generator == "system") != (noise_key is not None):
            raise Refused(
                f"the plan says that noise comes from the {plan.generator}, and the federation has "
                f"{'a' if noise_key is not None else 'no'} secret noise key; make them agree"
            )
        count = len(participants)
        self.layout = CohortLayout.over(count, clients_at_once, devices)
        self.roster = roster = Roster(
            participants, self.layout, training, plan, weights, lora.rank, self._seed
        )
        self._robust = robust = None if isinstance(combine, NormalisedMean) else combine
        max_norm = plan.clip_norm if plan.unit == "client" else update_bound
        check_combination(
            rule=rule,
            unit=plan.unit,
            drift=training.drift,
            hidden=not isinstance(sum_mode, Plain),
            combine=combine,
            bound=max_norm,
            weighs=roster.weighs,
            normalises=roster.weights.normalises_steps,
            by_loss=roster.by_loss is not None,
            attack=attackers.attack if attackers else None,
        )
        check_plan(plan, training, self.participants, weight_kinds(rule, roster.kind))
        check_correlation(plan, rule)
        check_selective(plan, sum_mode, rule)

        cloud_groups = None
        if isinstance(robust, GroupRobust):
            robust.check(len(roster.clouds))
            cloud_groups = tuple(int(group) for group in robust.assign(len(roster.clouds)))
        elif robust is not None:
            robust.check(count)
        adaptive = plan.adaptive if plan.unit == "client" else None
        noise_stddev = plan.noise_stddev if plan.trust == "central" else 0.0
        if adaptive is not None:
            # Messages are divided by the clip norm of their round.
            max_norm, noise_stddev = 1.0, noise_stddev / plan.clip_norm
        self._recipe = Recipe(
            layout=self.layout,
            training=training,
            rule=rule,
            row_loss=lambda base, adapter, row: row_loss(model, base, adapter, row, dtype, remat),
            by_loss=roster.by_loss,
            normalised=combine if isinstance(combine, NormalisedMean) else None,
            combine=robust,
            groups=cloud_groups and tuple(cloud_groups[cloud] for cloud in roster.cloud_K),
            clouds=roster.cloud_K,
            attackers=attackers,
            server_noise_stddev=noise_stddev,
            server_noise=plan.correlation if plan.trust == "central" else None,
            adaptive=adaptive,
            expected=sum(plan.expected_sizes) if plan.unit == "client" else float(count),
            # A sum of weights that follow from private data would be one more release.
            sums_weights=plan.unit != "client"
            and (roster.by_loss is not None or rule.weighs_by_result),
            measures_error=measure_error
            and combine is None
            and not rule.kept
            and not roster.weights.normalises_steps,
            ranks_differ=any(own != lora.rank for own in roster.ranks),
        )
        if self._recipe.sums_weights and count > WeightCodec.MOST_CLIENTS:
            raise UserError(
                f"weights that follow from results add up for at most {WeightCodec.MOST_CLIENTS} "
                f"clients, there are {count}; use weights that are known beforehand"
            )
        shapes = jax.eval_shape(
            lambda key: rule.init(init_adapter(model.config, lora, key)), public
        )
        noise: NoiseTable | None = None
        if plan.integer is None:
            bits = fitting_bits(value_bits, count)
        else:
            done, bits = mechanism_and_bits(
                model.config,
                lora,
                rule,
                plan.integer.shares,
                clip_norm=plan.clip_norm,
                noise_multiplier=plan.noise_multiplier,
                control=training.drift.control,
                bits=value_bits,
            )
            check_integer(plan, done, self.participants, sum_mode)
            for number in sorted(set[int]().union(*(p.offline_rounds for p in participants))):
                if number <= plan.allowed_rounds:
                    check_online(done, int(roster.online(number).sum()), number)
            noise = table_of(done, plan.noise_multiplier)
        self._programs = tuple(
            RoundPrograms(self._recipe, phase, self._codecs(shapes, phase, max_norm, bits, noise))
            for phase in range(len(rule.phases))
        )
        self._sizes = WireSizes(
            rule,
            shapes,
            roster.ranks,
            roster.cloud_K,
            training.drift.control,
            self._recipe.sums_weights,
            self._recipe.reads_messages,
            adaptive is not None,
        )
        self._base = self.layout.replicate(model.base)
        self._road = Road(
            self._base,
            self.layout,
            self._seed,
            self.participants,
            # Stopping by name would release what unit `client` hides: there the codec sends zeros.
            # With unit `example` an update follows from noised sums alone, and so does this error.
            plan.unit != "client",
            self._recipe.sums_weights,
        )
        self._held_out = HeldOut(
            self.layout,
            [participant.evaluation for participant in participants],
            lambda base, adapter, batch: loss(model.config, base, adapter, batch, dtype=dtype),
            evaluation_microbatch,
        )
        self._hidden: HiddenSums | None = None
        if not isinstance(sum_mode, Plain):
            codecs: list[Codec] = [c for programs in self._programs for c in programs.codecs]
            if self._recipe.sums_weights:
                codecs.append(WeightCodec)
            most = max(len(roster.members(cloud)) for cloud in range(len(roster.clouds)))
            self._hidden = HiddenSums(sum_mode, self.names, cloud_groups, most, codecs)

    def _codecs(
        self, server: Any, phase: int, max_norm: float, bits: int, noise: NoiseTable | None
    ) -> tuple[MessageCodec, ...]:
        """The fixed point of each stage's message."""
        rule, control = self.rule, self._training.drift.control
        found = []
        for stage, message in enumerate(rule.messages(server, phase)[0]):
            extra = rule.trainable(server, phase) if control and stage == 0 else ()
            tree = Upload(message, extra)
            found.append(
                MessageCodec.for_tree(
                    tree,
                    max_norm=max_norm,
                    bits=bits,
                    clients=len(self.participants),
                    noise=noise,
                    counts=self._recipe.adaptive is not None,
                )
            )
        return tuple(found)

    @property
    def parameters(self) -> int:
        """Numbers that each cloud sends in a round, the most of any."""
        return max(sum(codec.size for codec in programs.codecs) for programs in self._programs)

    @property
    def names(self) -> tuple[str, ...]:
        """The clouds' names, in order."""
        return self.roster.names

    @property
    def client_names(self) -> tuple[str, ...]:
        """The clients' names, in order; those of the clouds where each has one client."""
        return tuple(participant.name for participant in self.participants)

    def statement(self) -> str:
        """Who can decrypt what; a run prints it before it starts."""
        if self._hidden is None:
            return Plain().statement()
        words = self._hidden.statement()
        if len(self.participants) > len(self.names):
            words += (
                ". Clients of one cloud are summed inside it in the plain: their own cloud sees "
                "their updates, nobody else does"
            )
        sums = self.rule.stages + self._recipe.sums_weights
        if sums > 1:
            words += f". Each round opens {sums} sums of the same clouds"
        if self._recipe.sums_weights:
            words += ", the first of the clients' weights, and all see it"
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
            self._robust,
            self._recipe.server_noise,
            self._recipe.adaptive,
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
        client = None if cloud is None else self.roster.place_of(cloud)
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
            # A client with an adapter of its own is measured with that one.
            members = self.roster.members(cloud)
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
        self,
        state: FederationState,
        on_stage: OnStage = lambda stage: None,
        before_opening: BeforeOpening = lambda number, clouds: None,
    ) -> tuple[FederationState, RoundReport]:
        """Runs one round: broadcast, local training, sum, server step.

        Args:
            state: after the round before; it stays valid.
            on_stage: called with the name of each stage as it begins.
            before_opening: called with the round and the clouds that send, before the first sum of
                a round between clouds. Messages of a round repeat, so that two totals of one round
                over different clouds would tell their difference: whoever may run a round again in
                another process records this, and raises where the clouds differ.

        Raises:
            UserError: no cloud is online, or training diverged in a client. With privacy unit
                `client` such a client sends zeros and is counted in the report instead.
            Refused: fewer clouds are online than can decrypt, or the privacy plan accounts for no
                more rounds. The state is unchanged.
        """
        number = int(state.round) + 1
        if self.plan.unit != "none" and number > self.plan.allowed_rounds:
            within = "" if self.plan.budget is None else f" within epsilon {self.plan.budget:g}"
            raise Refused(
                f"round {number}: the privacy plan accounts for {self.plan.allowed_rounds} "
                f"rounds{within}; plan more, at a larger epsilon"
            )
        online_K = self.roster.online(number)
        online = self.roster.clouds_online(online_K)
        if isinstance(self._robust, GroupRobust):
            groups = self._recipe.groups or ()
            reached = {group for group, here in zip(groups, online_K, strict=True) if here}
            self._robust.inner.check(len(reached))
        elif self._robust is not None:
            self._robust.check(int(online_K.sum()))
        if self._hidden is not None:
            self._hidden.check(online)
        if self.plan.integer is not None:
            check_online(self.plan.integer, int(online_K.sum()), number)
        phase = self.rule.phase(number)
        programs = self._programs[phase]
        selected_K = online_K & self.roster.selected(number)
        clients = self.roster.inputs(state.clients, selected_K, online_K)
        inverse = jnp.float32(1 / self.roster.divisor(online_K, self._recipe.sums_weights))
        ledger = Ledger.of(self.names)
        on_stage("train")
        given = (programs, state.globals, clients, inverse, number, ledger)
        if self._hidden is None:
            applied, local, message = self._road.plain(*given)
        else:
            applied, local, message = self._road.hidden(
                *given, self._hidden, online, on_stage, before_opening
            )
        for cloud, name in enumerate(self.names):
            if self._hidden is None:
                ledger.sent[name] += self._sizes.up(phase, cloud, online_K.tolist())
            ledger.received[name] += self._sizes.down(phase, cloud, online_K.tolist())
        new = applied.state
        new_state = FederationState(
            jnp.int32(number),
            *_on_first_device((new.server, _own(local.state, len(self.participants)))),
            *_on_first_device((new.control, new.combine, new.noise, new.clip)),
        )
        return new_state, report(
            number=number,
            participants=self.participants,
            clouds=self.roster.clouds,
            cloud_K=self.roster.cloud_K,
            online=online,
            metrics=jax.device_get(local.metrics),
            norms_K=np.asarray(message.norm)[: len(self.participants)],
            private=self._training.privacy is not None,
            max_norm=programs.codecs[0].max_norm,
            update_norm=float(applied.update_norm),
            error=float(applied.error),
            ledger=ledger,
        )


_with_residual = jax.jit(add_dense)


def _own(states: PyTree, count: int) -> PyTree:
    """The clients' states without padding."""
    return jax.tree.map(lambda leaf: leaf[:count], states)


def _on_first_device(tree: PyTree) -> PyTree:
    """Takes one copy of a replicated tree, so that a state does not depend on the devices."""
    return jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), tree)
