"""The federation: clouds with their data around one frozen base model.

`Federation` holds what does not change (the base, the data on the devices, the compiled programs,
the keys of the encrypted sum); `FederationState` is a pytree that holds all that does. A round is
`state -> (state, report)`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import AggregationRule, LossWeights, Weights
from fedjax_llm.clouds.schedules import Schedule, Synchronous
from fedjax_llm.federation.assembly import Settings
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.compressor import Compression
from fedjax_llm.federation.engine import Engine
from fedjax_llm.federation.exchange import HiddenSums, OnStage
from fedjax_llm.federation.keys import roots_of
from fedjax_llm.federation.layout import CohortLayout, Memory
from fedjax_llm.federation.link_promises import check_cycles
from fedjax_llm.federation.machinery import Placing, machinery
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.federation.programs import RoundPrograms
from fedjax_llm.federation.promises import Combination
from fedjax_llm.federation.recipe import Attackers, Recipe
from fedjax_llm.federation.reports import RoundReport, report
from fedjax_llm.federation.roads import BeforeOpening
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.spending import Spending
from fedjax_llm.federation.state import FederationState, adapter_of, init_state
from fedjax_llm.federation.statement import statement
from fedjax_llm.federation.sums import SumMode, encrypted_fraction
from fedjax_llm.federation.tables import Participant, check_participants
from fedjax_llm.lora import Adapter, LoraConfig, add_dense
from fedjax_llm.models import Model
from fedjax_llm.privacy import PrivacyPlan
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
        schedule: when the server waits for whom; all wait for all if None.
        compression: how messages are shortened; they are sent whole if None.
        combine: directions instead of updates, or a robust combination; the mean if None.
        update_bound: largest l2 norm of one client's message; longer ones are shortened to it.
            With privacy unit `client` the plan's clip norm takes its place.
        value_bits: bits of one coordinate on the wire; `fitting_bits` chooses by default.
        weights: each client's weight in the mean: known beforehand (`Weights`, or numbers that
            count as depending on data), or by loss; uniform if None.
        attackers: clients that send something else than what they trained, to try a defence.
        measure_error: whether each round's report tells the aggregation error.
        steps: server steps of the run; the plan's rounds if None.
        seed: of all simulated randomness.
        noise_key: of noise and samples, from `privacy.secret_key`; from the seed if None.
        dtype: of activations.
        remat: whether activations are recomputed in the backward pass instead of kept.
        unroll: layers that are compiled in a row; on a CPU all of a small model's are some 15
            percent faster than one, and take longer to compile.
        evaluation_microbatch: evaluation rows in memory at once on a device.
        clients_at_once: clients in one vmap. If None a CPU takes a few of short rows, and an
            accelerator as many as its memory holds, found out by compiling before the first round.
        devices: where to run; all devices by default.
        mesh: how they are divided; all among the clients if None.
        timed_as: the sum whose bytes virtual time counts, where a trial adds messages on the
            devices in place of it; `sum_mode` if None.
        rows: where the clients' training rows lie: in the devices' memory, or in the host's, from
            which each group's are copied while the group before it computes. The bytes of results
            are the same. "auto" leaves them on the host where an accelerator does not hold them
            beside the compiled program.

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
        schedule: Schedule | None = None,
        compression: Compression | None = None,
        combine: Combination | None = None,
        update_bound: float = 1.0,
        value_bits: int | None = None,
        weights: Weights | LossWeights | Sequence[float] | None = None,
        attackers: Attackers | None = None,
        measure_error: bool = True,
        steps: int | None = None,
        seed: int = 0,
        noise_key: jax.Array | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        unroll: int = 1,
        evaluation_microbatch: int = 8,
        clients_at_once: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        mesh: MeshShape | None = None,
        timed_as: SumMode | None = None,
        rows: Memory | Literal["auto"] = "auto",
    ) -> None:
        check_participants(participants, lora.rank, training, rule.facts.ranks)
        self.model, self.participants = model, tuple(participants)
        self.lora, self.plan, self.sum_mode, self.rule = lora, plan, sum_mode, rule
        self.schedule = schedule or Synchronous()
        self.steps = plan.rounds if steps is None else steps
        self._training = training
        self._seed = roots_of(seed, noise_key, plan)
        settings = Settings(
            lora=lora,
            training=training,
            rule=rule,
            plan=plan,
            sum_mode=sum_mode,
            schedule=self.schedule,
            compression=compression,
            combine=combine,
            update_bound=update_bound,
            value_bits=value_bits,
            attackers=attackers,
            measure_error=measure_error,
            dtype=dtype,
            remat=remat,
            unroll=unroll,
        )
        parts = machinery(
            model,
            self.participants,
            settings,
            Placing(clients_at_once, devices, mesh, rows, evaluation_microbatch),
            weights=weights,
            timed_as=timed_as,
            steps=self.steps,
            seed=seed,
            roots=self._seed,
        )
        self._rounds, self._held_out, self._sizes = parts.rounds, parts.held_out, parts.sizes
        check_cycles(plan, self.calendar, self.steps)

    @property
    def layout(self) -> CohortLayout:
        """Where the clients are computed."""
        return self._engine.layout

    @property
    def roster(self) -> Roster:
        """Who the clients are and what each counts."""
        return self._engine.roster

    @property
    def _programs(self) -> tuple[RoundPrograms, ...]:
        return self._engine.programs

    @property
    def _recipe(self) -> Recipe:
        return self._engine.recipe

    @property
    def _base(self) -> PyTree:
        return self._engine.road.base

    @property
    def _hidden(self) -> HiddenSums | None:
        return self._rounds.hidden

    @property
    def clients_at_once(self) -> int:
        """Clients in one vmap on a device.

        The bytes of a result depend on it, and it follows from the device's memory where nothing
        else is asked for: set it, or `keep_at_once`, to find the same bytes elsewhere.
        """
        return self._engine.layout.group

    def keep_at_once(self, clients: int | None) -> None:
        """Runs so many clients at once from now on, whatever fits; nothing changes if None."""
        if clients is not None:
            self._rounds.keep_at_once(clients)

    @property
    def _engine(self) -> Engine:
        return self._rounds.engine

    @property
    def calendar(self) -> Calendar:
        """Who does what when, in virtual time; known before anything is trained."""
        return self._rounds.almanac.calendar(self.steps)

    @property
    def spending(self) -> Spending:
        """What steps of this run cost of its privacy plan."""
        return Spending(
            self.plan, self.calendar, self.participants, self.roster.cloud_K, self.steps
        )

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
        return statement(self.sum_mode, self._hidden, self._recipe)

    @property
    def encrypted_fraction(self) -> float:
        """Parameters that leave a cloud encrypted or masked, over all that it sends."""
        return encrypted_fraction(self.sum_mode)

    def init(self) -> FederationState:
        """Returns the state before the first round."""
        return init_state(
            self.model.config,
            self.lora,
            self.rule,
            self._training,
            self._seed,
            len(self.participants),
            self._rounds.robust,
            self._recipe.server_noise,
            self._recipe.adaptive,
            self._recipe.replicas is not None,
            self._recipe.compressor,
            None
            if self.schedule.timely
            else (self.calendar.slots, self._programs[0].codecs[0].length[0]),
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
        residual, base, place = state.server.residual, self._base, self.layout.replicate
        if residual:
            base = _with_residual(base, place(residual))
        clients = range(len(self.participants)) if self.rule.kept else (None,)
        adapters = (place(adapter_of(self.rule, state, client)) for client in clients)
        members = {name: self.roster.members(cloud) for cloud, name in enumerate(self.names)}
        return self._held_out.losses(base, adapters, members)

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
        before_opening: BeforeOpening = lambda what: None,
        *,
        donate: bool = False,
    ) -> tuple[FederationState, RoundReport]:
        """Runs one round: broadcast, local training, sum, server step.

        Args:
            state: after the round before; it stays valid unless it is donated.
            on_stage: called with the name of each stage as it begins.
            before_opening: called before each sum between clouds. Messages of a round repeat, so
                that two totals of one round over different clouds would tell their difference, and
                two of integers that were rounded in another way, with the same noise, would tell
                something without any: whoever may run a round again in another process records
                this, and raises where clouds or integers differ.
            donate: whether the memory of `state` may be used again, by which a round of many
                clients that carry much takes half of it. Taken up where a round is one program.

        Where memory runs out while clients train, half of them run at once from then on
        (`RoundReport.clients_at_once`), and the round begins again.

        Raises:
            UserError: no cloud is online, or training diverged in a client. With privacy unit
                `client` such a client sends zeros and is counted in the report instead.
            Refused: fewer clouds are online than can decrypt, or the privacy plan accounts for no
                more rounds. The state is unchanged.
        """
        number = int(state.round) + 1
        self.spending.check(number)
        done = self._rounds.run(state, number, on_stage, before_opening, donate)
        outcome, ledger = done.outcome, done.ledger
        phase = self.rule.phase(number)
        if self._hidden is None:
            ledger.add(sent=self._sizes.up(phase, done.lands_K))
        ledger.add(received=self._sizes.down(phase, done.lands_K))
        new = outcome.applied.state
        new_state = FederationState(
            self.layout.replicate(np.int32(number)),
            new.server,
            self.layout.collect(outcome.clients),
            new.control,
            new.combine,
            new.noise,
            new.clip,
            new.compression,
            outcome.pending,
        )
        return new_state, report(
            number=number,
            participants=self.participants,
            clouds=self.roster.clouds,
            cloud_K=self.roster.cloud_K,
            online=done.online,
            metrics=jax.device_get(outcome.metrics),
            norms_K=np.asarray(outcome.norm_K)[: len(self.participants)],
            private=self._training.privacy is not None,
            max_norm=self._programs[phase].codecs[0].max_norm,
            update_norm=float(outcome.applied.update_norm),
            error=float(outcome.applied.error),
            ledger=ledger,
            calendar=done.calendar,
            clients_at_once=self.clients_at_once,
        )


_with_residual = jax.jit(add_dense)
