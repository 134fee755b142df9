"""The federation: clouds with their data around one frozen base model.

`Federation` holds what does not change (the base, the data on the devices, the compiled programs,
the keys of the encrypted sum); `FederationState` is a pytree that holds all that does. A round is
`state -> (state, report)`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.clouds import check_unique, round_seconds
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.cohort import ClientInputs, ClientOutputs, CohortLayout
from fedjax_llm.federation.evaluation import HeldOut
from fedjax_llm.federation.exchange import Ledger, OnStage, encrypted_sum
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.federation.message import MessageCodec, fitting_bits
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.federation.programs import RoundPrograms
from fedjax_llm.federation.promises import check_plan, check_selective, check_sum
from fedjax_llm.federation.reports import CloudReport, RoundReport
from fedjax_llm.federation.state import FederationState, init_state
from fedjax_llm.federation.sums import Plain, Selective, SumMode
from fedjax_llm.federation.tables import Participant, client_tables, scaled_weights
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Model, loss
from fedjax_llm.privacy import PrivacyPlan, poisson_sample
from fedjax_llm.secure.sums import SecureSum, checked_clients
from fedjax_llm.training import LocalTraining

PyTree = Any


class Federation:
    """Clouds that fine-tune one model together.

    Args:
        model: the frozen base, its configuration and tokenizer.
        participants: the clouds, in the order that addresses their randomness.
        lora: rank, alpha and targets of the adapter.
        training: one client's local update.
        rule: how messages become the next adapter.
        plan: what is promised about privacy; checked against what is really done.
        sum_mode: how messages are added.
        update_bound: largest l2 norm of one cloud's message; longer ones are shortened to it.
            With privacy unit `client` the plan's clip norm takes its place.
        value_bits: bits of one coordinate on the wire; `fitting_bits` chooses by default.
        weights: each cloud's public weight in the mean, scaled to a largest of 1; uniform if None.
        seed: of all simulated randomness.
        dtype: of activations.
        remat: whether activations are recomputed in the backward pass instead of kept.
        evaluation_microbatch: evaluation rows in memory at once on a device.
        clients_at_once: clients in one vmap; chosen by platform if None.
        devices: where to run; all devices by default.

    Raises:
        UserError: no clouds, two of one name, bits or weights that do not fit.
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
        update_bound: float = 1.0,
        value_bits: int | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        evaluation_microbatch: int = 8,
        clients_at_once: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        check_unique(tuple(participant.cloud for participant in participants))
        check_sum(rule, sum_mode)
        self.model = model
        self.participants = tuple(participants)
        self.lora = lora
        self.plan = plan
        self.sum_mode = sum_mode
        self._training = training
        self._rule = rule
        self._seed = seed_key(seed)
        self._names = tuple(participant.cloud.name for participant in participants)
        self._weights_K = scaled_weights(weights, len(participants))
        self.layout = CohortLayout.over(len(participants), clients_at_once, devices)
        check_plan(plan, training, self.participants, self._weights_K)
        check_selective(plan, sum_mode)

        template = jax.eval_shape(
            lambda key: rule.trainable(init_adapter(model.config, lora, key)), self._seed
        )
        self._codec = MessageCodec.for_tree(
            template,
            max_norm=plan.clip_norm if plan.unit == "client" else update_bound,
            bits=fitting_bits(value_bits, len(participants)),
            clients=len(participants),
        )
        self._programs = RoundPrograms(
            self.layout,
            training,
            rule,
            self._codec,
            lambda base, adapter, row: row_loss(model, base, adapter, row, dtype, remat),
            plan.noise_stddev if plan.unit == "client" else 0.0,
        )
        self._base = self.layout.replicate(model.base)
        self._tables = self.layout.shard(client_tables(self.participants, training))
        self._held_out = HeldOut(
            self.layout,
            [participant.evaluation for participant in participants],
            lambda base, adapter, batch: loss(model.config, base, adapter, batch, dtype=dtype),
            evaluation_microbatch,
        )
        self._secure_sum: SecureSum | None = None
        if not isinstance(sum_mode, Plain):
            self._secure_sum = sum_mode.open(self._names, self._codec.size, self._codec.fixed_point)

    @property
    def parameters(self) -> int:
        """Trained parameters, P: what each cloud sends in a round."""
        return self._codec.size

    @property
    def names(self) -> tuple[str, ...]:
        """The clouds' names, in order."""
        return self._names

    def statement(self) -> str:
        """Who can decrypt what; a run prints it before it starts."""
        if self._secure_sum is None:
            return Plain().statement()
        words = self._secure_sum.statement()
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
        return 0.0 if self._secure_sum is None else 1.0

    def init(self) -> FederationState:
        """Returns the state before the first round."""
        return init_state(
            self.model.config,
            self.lora,
            self._rule,
            self._training,
            self._seed,
            len(self._names),
        )

    def evaluate(self, state: FederationState) -> dict[str, float]:
        """Returns each cloud's held-out loss in nats per answer token."""
        adapter = self.layout.replicate(state.server.adapter)
        losses = self._held_out.losses(self._base, adapter)
        return dict(zip(self._names, losses, strict=True))

    def rounds(
        self, state: FederationState, count: int
    ) -> Iterator[tuple[FederationState, RoundReport]]:
        """Yields the state and report after each of `count` rounds."""
        for _ in range(count):
            state, report = self.run_round(state)
            yield state, report

    def run_round(
        self, state: FederationState, on_stage: OnStage = lambda stage: None
    ) -> tuple[FederationState, RoundReport]:
        """Runs one round: broadcast, local training, sum, server step.

        Args:
            state: after the round before; it stays valid.
            on_stage: called with the name of each stage as it begins.

        Raises:
            UserError: no cloud is online, or training diverged in a cloud. With privacy unit
                `client` such a cloud sends zeros and is counted in the report instead.
            Refused: fewer clouds are online than can decrypt, or the privacy plan accounts for no
                more rounds. The state is unchanged.
        """
        round_number = int(state.round) + 1
        if self.plan.unit != "none" and round_number > self.plan.rounds:
            raise Refused(
                f"round {round_number}: the privacy plan accounts for {self.plan.rounds} rounds; "
                "plan more, at a larger epsilon"
            )
        online_K = np.array(
            [round_number not in p.offline_rounds for p in self.participants], dtype=bool
        )
        if not online_K.any():
            raise UserError(f"round {round_number}: no cloud is online; resume when one is")
        selected_K = online_K & self._selected(round_number)
        divisor = self._divisor(online_K)
        clients = self._client_inputs(state, selected_K)
        server = self.layout.replicate(state.server)
        where = (self._seed, jnp.int32(round_number))

        ledger = Ledger.of(self._names)
        online = [name for name, here in zip(self._names, online_K, strict=True) if here]
        if self._secure_sum is not None:
            self._secure_sum.check_alive(online)
            # The sum refuses too few as well, but only once everybody has trained in vain.
            checked_clients(online, self._secure_sum.minimum_clients, self._secure_sum.summands)
        on_stage("train")
        started = time.perf_counter()
        if self._secure_sum is None:
            applied, outputs = jax.block_until_ready(
                self._programs.round(self._base, server, clients, divisor, *where)
            )
            self._check_finite(outputs, round_number)
            ledger.seconds["train"] = time.perf_counter() - started
            for name in online:
                ledger.sent[name] = 4 * self._codec.size
        else:
            outputs = jax.block_until_ready(
                self._programs.train(self._base, server.adapter, clients, *where)
            )
            self._check_finite(outputs, round_number)
            ledger.seconds["train"] = time.perf_counter() - started
            total_P = encrypted_sum(
                self._secure_sum,
                outputs.message.ints_P,
                self._names,
                online,
                round_number,
                ledger,
                on_stage,
            )
            started = time.perf_counter()
            applied = jax.block_until_ready(
                self._programs.apply(jnp.asarray(total_P, jnp.int32), divisor, server, *where)
            )
            ledger.seconds["apply"] = time.perf_counter() - started
        for name in online:
            ledger.received[name] += 4 * self._codec.size  # the broadcast
        new_state = FederationState(
            jnp.int32(round_number),
            _on_first_device(applied.server),
            jax.tree.map(lambda leaf: leaf[: len(self._names)], outputs.optimizer),
        )
        return new_state, self._report(round_number, applied.update_norm, outputs, online, ledger)

    def _selected(self, round_number: int) -> np.ndarray:
        """Which clients take part: all, or a Poisson sample when the unit is the client."""
        count = len(self._names)
        if self.plan.unit != "client" or self.plan.sampler.kind == "full":
            return np.ones(count, dtype=bool)
        key = key_for(self._seed, Purpose.CLIENT_SAMPLING, round_number)
        indices_K, chosen = poisson_sample(key, count, self.plan.sampler.rates[0], count)
        selected_K = np.zeros(count, dtype=bool)
        selected_K[np.asarray(indices_K)[: int(chosen)]] = True
        return selected_K

    def _divisor(self, online_K: np.ndarray) -> jax.Array:
        """The public number that turns the sum into a mean."""
        weight = float(self._weights_K[online_K].sum())
        if self.plan.unit == "client":
            # The expected number, not the realised one, which the guarantee does not cover.
            weight *= self.plan.sampler.rates[0]
        return jnp.float32(weight)

    def _client_inputs(self, state: FederationState, selected_K: np.ndarray) -> ClientInputs:
        count = len(self._names)
        place, weight, participates = self.layout.shard(
            (np.arange(count, dtype=np.int32), self._weights_K, selected_K)
        )
        optimizer = self.layout.shard(jax.device_get(state.clients))
        return ClientInputs(place, self._tables, optimizer, weight, participates)

    def _check_finite(self, outputs: ClientOutputs, round_number: int) -> None:
        if self.plan.unit == "client":
            # Stopping here, by name, would release what the unit hides: the codec sends zeros. With
            # unit `example` an update follows from noised sums alone, and so does this error.
            return
        norms = np.asarray(outputs.message.norm)[: len(self._names)]
        for name, norm in zip(self._names, norms, strict=True):
            if not np.isfinite(norm):
                raise UserError(
                    f"round {round_number}: the update of cloud {name!r} is not finite, training "
                    "diverged; lower [training] learning_rate (the last round's state is kept)"
                )

    def _report(
        self,
        round_number: int,
        update_norm: jax.Array,
        outputs: ClientOutputs,
        online: list[str],
        ledger: Ledger,
    ) -> RoundReport:
        metrics = jax.device_get(outputs.metrics)
        links = {p.cloud.name: p.cloud.link for p in self.participants}
        rows = {name: int(metrics.rows[k]) for k, name in enumerate(self._names)}
        all_rows = max(sum(rows.values()), 1)
        times = round_seconds(
            {name: links[name] for name in online},
            {name: ledger.received[name] for name in online},
            {name: ledger.seconds["train"] * rows[name] / all_rows for name in online},
            {name: ledger.sent[name] for name in online},
        )
        clouds = {}
        for k, name in enumerate(self._names):
            loss_train = float(metrics.loss_sum[k]) / rows[name] if rows[name] else None
            link = times.down[name] + times.up[name] if name in times.down else 0.0
            clouds[name] = CloudReport(
                name in online,
                loss_train,
                rows[name],
                ledger.sent[name],
                ledger.received[name],
                link,
            )
        norms = np.asarray(outputs.message.norm)[: len(self._names)]
        if self._training.privacy is not None:
            clipped = float(metrics.clipped[: len(self._names)].sum()) / all_rows
        else:
            clipped = float((norms * self._weights_K > self._codec.max_norm).sum()) / len(online)
        length = self.participants[0].train.tokens_BxT.shape[1]
        return RoundReport(
            round=round_number,
            clouds=clouds,
            tokens=sum(rows.values()) * length,
            update_norm=float(update_norm),
            clipped_fraction=clipped,
            clouds_diverged=int(np.sum(~np.isfinite(norms))),
            seconds=ledger.seconds,
            seconds_virtual=times.seconds,
        )


def _on_first_device(tree: PyTree) -> PyTree:
    """Takes one copy of a replicated tree, so that a state does not depend on the devices."""
    return jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), tree)
