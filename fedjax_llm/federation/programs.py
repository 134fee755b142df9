"""The compiled programs of a round: one when the sum stays on the devices, more when it does not.

    plain:      (base, server, clients) -> train -> send -> sum -> apply -> server
    encrypted:  (base, server, clients) -> train -> integers | host | integers -> apply -> server

A rule of two stages, or weights that follow from results, put one more sum between the two. The
pieces are the same functions on both roads, kept apart by optimisation barriers where they share a
program, so that XLA cannot fuse across a sum and both end in the same bytes.

Notation: K' clients with padding, P numbers of a message, G sums that stay apart (groups).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_llm.aggregation import (
    AggregationRule,
    NormalisedMean,
    Round,
    ServerState,
    aggregation_error,
    mean_product,
    with_plain_step,
)
from fedjax_llm.aggregation.attacks import Attack
from fedjax_llm.aggregation.robust import Combine, GroupRobust
from fedjax_llm.aggregation.weights import LossWeights
from fedjax_llm.federation.cohort import Client, ClientInputs, Local, RowLossOfBase, Shared
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.message import EncodedMessage, MessageCodec, WeightCodec
from fedjax_llm.lora import add_dense
from fedjax_llm.privacy import gaussian_noise_like
from fedjax_llm.training import LocalTraining

PyTree = Any


class Global(NamedTuple):
    """What the server holds.

    Attributes:
        server: adapter, optimiser and memory of the rule.
        control: the global control variate of each phase; () without SCAFFOLD.
        combine: memory of a robust combination; () for most.
    """

    server: ServerState
    control: tuple[PyTree, ...]
    combine: PyTree


class Applied(NamedTuple):
    """The server's state after a round, and what the round came to.

    Attributes:
        state: after the round.
        update_norm: l2 norm of the update, before the server's optimiser.
        error: see `aggregation.error`; NaN where it is not measured.
    """

    state: Global
    update_norm: jax.Array
    error: jax.Array


class Sums(NamedTuple):
    """What has been summed before the last stage.

    Attributes:
        inverse_weight: one over the sum of the weights that follow from results; None without.
        public: what the rule made of its stage before; () in the first.
    """

    inverse_weight: jax.Array | None = None
    public: PyTree = ()


@dataclass(frozen=True)
class Attackers:
    """Clients that send something else than what they trained, in a simulation.

    Attributes:
        attack: what they send.
        malicious: one bool for each client.
        scale: of the attack.
    """

    attack: Attack
    malicious: tuple[bool, ...]
    scale: float


@dataclass(frozen=True)
class Recipe:
    """All that the programs of a federation are built from.

    Attributes:
        layout: where clients run.
        training: the local update.
        rule: trainable part, messages and server step.
        row_loss: `(base, adapter, row) -> loss in nats`.
        by_loss: weights that follow from losses, or None.
        normalised: messages are divided by their length, or None.
        combine: how messages, or group sums, are combined; None is the mean.
        groups: of each client if group sums stay apart, else None.
        clouds: the cloud of each client; clients of one are summed before anything leaves it.
        attackers: of a simulation with malicious clients, or None.
        server_noise_stddev: standard deviation of the Gaussian noise that the server adds to each
            coordinate of the *sum*; 0 where the clients' messages are private already.
        sums_weights: whether weights are summed before messages are sent.
        measures_error: whether the aggregation error is measured.
    """

    layout: CohortLayout
    training: LocalTraining
    rule: AggregationRule
    row_loss: RowLossOfBase
    by_loss: LossWeights | None
    normalised: NormalisedMean | None
    combine: Combine | GroupRobust | None
    groups: tuple[int, ...] | None
    clouds: tuple[int, ...]
    attackers: Attackers | None
    server_noise_stddev: float
    sums_weights: bool
    measures_error: bool

    @property
    def reads_messages(self) -> bool:
        """Whether the server reads messages one by one."""
        return self.rule.needs_individual_messages or isinstance(self.combine, Combine)


class RoundPrograms:
    """The compiled programs for the rounds of one phase.

    Args:
        recipe: what to build.
        phase: of the rule.
        codecs: fixed point of the message of each stage.
    """

    def __init__(self, recipe: Recipe, phase: int, codecs: tuple[MessageCodec, ...]) -> None:
        self._recipe, self._phase, self.codecs = recipe, phase, codecs
        self._client = Client(
            recipe.training,
            recipe.rule,
            phase,
            codecs,
            recipe.row_loss,
            recipe.by_loss,
            recipe.normalised,
            recipe.reads_messages,
        )
        self.train = jax.jit(self._train)
        self.train_and_send = jax.jit(self._train_and_send)
        self.weigh = jax.jit(self._weigh)
        self.send = jax.jit(self._send, static_argnums=0)
        self.between = jax.jit(self._between, static_argnums=0)
        self.by_cloud = jax.jit(self._by_cloud)
        self.inverse_weight = jax.jit(_inverse_weight)
        self.apply = jax.jit(self._apply)
        self.round = jax.jit(self._round)

    @property
    def stages(self) -> int:
        """Sums of messages."""
        return len(self.codecs)

    @property
    def results_needed(self) -> bool:
        """Whether what clients trained is read again after their first message."""
        recipe = self._recipe
        return recipe.sums_weights or self.stages > 1 or recipe.measures_error

    # What clients do.

    def _shared(self, base: PyTree, state: Global, number: jax.Array, seed: jax.Array) -> Shared:
        control = state.control[self._phase] if state.control else ()
        residual = state.server.residual
        if base and residual:
            base = add_dense(base, residual)
        # Messages are written without the base, and without what is as large.
        return Shared(base, state.server._replace(residual={}), number, control, seed)

    def _train(
        self,
        base: PyTree,
        state: Global,
        clients: ClientInputs,
        seed: jax.Array,
        number: jax.Array,
    ) -> Local:
        shared = self._shared(base, state, number, seed)
        return self._recipe.layout.map_clients(self._client.train)(shared, clients)

    def _train_and_send(
        self,
        base: PyTree,
        state: Global,
        clients: ClientInputs,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[Local, EncodedMessage]:
        """Training and the message of the first stage; no float of it outlives its client."""
        shared = self._shared(base, state, number, seed)
        if self._recipe.attackers is not None:
            local = self._train(base, state, clients, seed, number)
            return local, self._send(0, state, clients, local, Sums(), seed, number)

        def one(shared: Shared, client: ClientInputs) -> tuple[Local, EncodedMessage]:
            local = self._client.train(shared, client)
            message = self._client.send(0, shared, client, local, (), None)
            if not self.results_needed:
                local = local._replace(after={}, control=())
            return local, message

        return self._recipe.layout.map_clients(one)(shared, clients)

    def _weigh(
        self,
        state: Global,
        clients: ClientInputs,
        local: Local,
        seed: jax.Array,
        number: jax.Array,
    ) -> jax.Array:
        def one(shared: Shared, pair: tuple[ClientInputs, Local]) -> jax.Array:
            return self._client.weigh(shared, *pair)

        shared = self._shared({}, state, number, seed)
        return self._recipe.layout.map_clients(one)(shared, (clients, local))

    def _send(
        self,
        stage: int,
        state: Global,
        clients: ClientInputs,
        local: Local,
        sums: Sums,
        seed: jax.Array,
        number: jax.Array,
    ) -> EncodedMessage:
        layout, client = self._recipe.layout, self._client
        shared = self._shared({}, state, number, seed)
        attackers = self._recipe.attackers
        if attackers is None:

            def one(
                everything: tuple[Shared, Sums], pair: tuple[ClientInputs, Local]
            ) -> EncodedMessage:
                shared, sums = everything
                return client.send(stage, shared, *pair, sums.public, sums.inverse_weight)

            return layout.map_clients(one)((shared, sums), (clients, local))

        def honest(
            everything: tuple[Shared, Sums], pair: tuple[ClientInputs, Local]
        ) -> tuple[jax.Array, PyTree]:
            shared, sums = everything
            upload = client.upload(stage, shared, *pair, sums.public, sums.inverse_weight)
            return ravel_pytree(upload.message)[0], upload.control

        messages_KxP, control_K = layout.map_clients(honest)((shared, sums), (clients, local))
        padding = (False,) * (layout.padded - len(attackers.malicious))
        messages_KxP = attackers.attack(
            messages_KxP,
            jnp.asarray(attackers.malicious + padding),
            clients.participates,
            key_for(seed, Purpose.ATTACK, number, stage),
            attackers.scale,
        )

        def encoded(shared: PyTree, pair: tuple[jax.Array, PyTree, jax.Array]) -> EncodedMessage:
            del shared
            message_P, control, participates = pair
            unravel = self.codecs[stage].unravel
            whole_P = jnp.concatenate([message_P, ravel_pytree(control)[0]])
            message = self.codecs[stage].encode(unravel(whole_P))
            return jax.tree.map(lambda x: jnp.where(participates, x, jnp.zeros_like(x)), message)

        return layout.map_clients(encoded)((), (messages_KxP, control_K, clients.participates))

    # What the server does.

    def _round_of(self, state: Global, seed: jax.Array, number: jax.Array) -> Round:
        key = key_for(seed, Purpose.RULE, number)
        return Round(state.server, self._phase, number, key)

    def _between(
        self,
        stage: int,
        total_P: jax.Array,
        inverse: jax.Array,
        state: Global,
        seed: jax.Array,
        number: jax.Array,
    ) -> PyTree:
        """What the sum of a stage tells all clients."""
        codec = self.codecs[stage]
        mean = jax.lax.optimization_barrier(codec.unravel(codec.decode(total_P) * inverse).message)
        return self._recipe.rule.between(self._round_of(state, seed, number), stage, mean)

    def _apply(
        self,
        total: jax.Array,
        inverse: jax.Array,
        state: Global,
        clients: ClientInputs,
        local: Local,
        sums: Sums,
        seed: jax.Array,
        number: jax.Array,
    ) -> Applied:
        """The server's step.

        Args:
            total: int32; the sum [P], group sums [G, P], or every message [K, P].
            inverse: what turns the sum into a mean, one over the sum of weights. A product, because
                XLA makes one of a division on two devices and not on one, with other bytes.
            state: that was broadcast.
            clients: public weights and who takes part; of group sums, who is in them.
            local: what clients trained, to measure the error; without it nothing is measured.
            sums: of the stages before.
            seed: the run's key.
            number: the round.
        """
        recipe, codec = self._recipe, self.codecs[-1]
        barrier = jax.lax.optimization_barrier
        round_ = self._round_of(state, seed, number)
        present_K, ranks_K = recipe.layout.gathered((clients.participates, clients.rank))
        shares_K = self._shares(clients, local, state, sums, seed, number)

        def applied_by(rule: AggregationRule, round_: Round) -> tuple[ServerState, PyTree, PyTree]:
            memory = state.combine
            if recipe.combine is not None:
                if isinstance(recipe.combine, GroupRobust):
                    counts_G = self._group_counts(present_K)
                    combined_P, memory = recipe.combine.combine_groups(
                        codec.decode(total), counts_G, memory
                    )
                else:
                    combined_P, memory = recipe.combine.combine(
                        codec.decode(total), present_K, memory
                    )
                mean = codec.unravel(combined_P)
                return rule.apply(round_, mean.message, sums.public), memory, mean
            if rule.needs_individual_messages:
                uploads_K = jax.vmap(lambda ints: codec.unravel(codec.decode(ints)))(total)
                after = rule.apply_each(round_, uploads_K.message, shares_K, ranks_K)
                mean = jax.tree.map(lambda leaf_K: jnp.tensordot(shares_K, leaf_K, 1), uploads_K)
                return after, memory, mean
            sum_P = codec.decode(total)
            if recipe.server_noise_stddev > 0:
                key = key_for(seed, Purpose.SERVER_NOISE, number)
                sum_P = sum_P + gaussian_noise_like(key, sum_P, recipe.server_noise_stddev)
            mean = barrier(codec.unravel(sum_P * inverse))
            return rule.apply(round_, mean.message, sums.public), memory, mean

        server, memory, mean = barrier(applied_by(recipe.rule, round_))
        control = state.control
        if control:
            # The server's variate is the mean over all clients, who took part or not
            # (arXiv 1910.06378, algorithm 1, line 17).
            scale = 1 / (inverse * jnp.float32(recipe.layout.clients))
            own = jax.tree.map(lambda c, d: c + d * scale, control[self._phase], mean.control)
            control = (*control[: self._phase], own, *control[self._phase + 1 :])
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean.message)]
        error = jnp.float32(jnp.nan)
        if recipe.measures_error:
            plain = with_plain_step(recipe.rule)
            started = plain.restarted(state.server)
            if recipe.rule.optimizer is plain.optimizer:
                aggregated = server
            else:
                aggregated, _, _ = applied_by(plain, round_._replace(server=started))
            after_K = recipe.layout.gathered(local.after)
            truth = mean_product(recipe.rule, state.server, after_K, shares_K)
            error = aggregation_error(truth, state.server, aggregated)
        return Applied(
            Global(server, control, memory), jnp.sqrt(jnp.sum(jnp.stack(squares))), error
        )

    def _shares(
        self,
        clients: ClientInputs,
        local: Local,
        state: Global,
        sums: Sums,
        seed: jax.Array,
        number: jax.Array,
    ) -> jax.Array:
        """Each client's share in the mean, float32 [K], adding up to one."""
        weights_K = jnp.where(clients.participates, clients.weight, jnp.float32(0))
        if sums.inverse_weight is not None:
            limbs_Kx4 = self._weigh(state, clients, local, seed, number)
            weights_K = jax.vmap(WeightCodec.decode)(limbs_Kx4)
        weights_K = self._recipe.layout.gathered(weights_K)
        return weights_K * (1 / jnp.sum(weights_K))

    def _group_counts(self, present_K: jax.Array) -> jax.Array:
        groups = self._recipe.groups
        assert groups is not None
        count = max(groups) + 1
        return jax.ops.segment_sum(present_K.astype(jnp.int32), jnp.asarray(groups), count)

    def total(self, ints_KxP: jax.Array) -> jax.Array:
        """What the server may see of the messages: their sum, group sums, or each of them."""
        recipe = self._recipe
        if recipe.reads_messages:
            return recipe.layout.gathered(ints_KxP)
        if recipe.groups is not None:
            own_KxP = recipe.layout.gathered(ints_KxP)
            count = max(recipe.groups) + 1
            return jax.ops.segment_sum(own_KxP, jnp.asarray(recipe.groups), count)
        # Integers: the order of the clients and the number of devices cannot change a bit.
        return recipe.layout.everywhere(jnp.sum(ints_KxP, axis=0, dtype=jnp.int32))

    def _by_cloud(self, ints_KxP: jax.Array) -> jax.Array:
        """What leaves each cloud: the sum over its clients, in the plain inside the cloud."""
        clouds = self._recipe.clouds
        count = max(clouds) + 1
        if count == len(clouds):
            return ints_KxP
        return jax.ops.segment_sum(ints_KxP[: len(clouds)], jnp.asarray(clouds), count)

    # Both in one program.

    def _round(
        self,
        base: PyTree,
        state: Global,
        clients: ClientInputs,
        inverse: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[Applied, Local, EncodedMessage, jax.Array]:
        """A whole round: the server, what clients carry on, norms, and limbs of weights."""
        barrier = jax.lax.optimization_barrier
        sums = Sums()
        limbs_Kx4 = jnp.zeros((0, WeightCodec.LIMBS), jnp.int32)
        if self._recipe.sums_weights:
            local = barrier(self._train(base, state, clients, seed, number))
            limbs_Kx4 = barrier(self._weigh(state, clients, local, seed, number))
            total_4 = barrier(jnp.sum(limbs_Kx4, axis=0, dtype=jnp.int32))
            sums = Sums(inverse_weight=barrier(_inverse_weight(total_4)))
            sent = barrier(self._send(0, state, clients, local, sums, seed, number))
        else:
            local, sent = barrier(self._train_and_send(base, state, clients, seed, number))
        first = sent
        for stage in range(1, self.stages):
            total_P = barrier(self.total(sent.ints_P))
            public = barrier(self._between(stage - 1, total_P, inverse, state, seed, number))
            sums = sums._replace(public=public)
            sent = barrier(self._send(stage, state, clients, local, sums, seed, number))
        total = barrier(self.total(sent.ints_P))
        applied = self._apply(total, inverse, state, clients, local, sums, seed, number)
        # The individual messages and results stay inside the program.
        first = first._replace(ints_P=jnp.zeros((0,), jnp.int32))
        return applied, local._replace(after={}, control=()), first, limbs_Kx4


def _inverse_weight(total_4: jax.Array) -> jax.Array:
    """One over the sum of weights; the sum is above 0, see `WeightCodec.check`."""
    return 1 / WeightCodec.decode(total_4)
