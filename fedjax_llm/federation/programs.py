"""The compiled programs of a round: one when the sum stays on the devices, more when it does not.

    plain:      (base, server, clients) -> train -> send -> sum -> apply -> server
    encrypted:  (base, server, clients) -> train -> integers | host | integers -> apply -> server

A rule of two stages, or weights that follow from results, put one more sum between the two. The
pieces are the same functions on both roads, kept apart by optimisation barriers where they share a
program, so that XLA cannot fuse across a sum and both end in the same bytes.

Notation: K' clients with padding, P numbers of a message.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.federation.attacked import attacked
from fedjax_llm.federation.client_values import ClientInputs, ClientState, Local, Shared
from fedjax_llm.federation.cohort import Client
from fedjax_llm.federation.message import EncodedMessage, MessageCodec, WeightCodec
from fedjax_llm.federation.recipe import Applied, Global, Recipe, Sums
from fedjax_llm.federation.server import Server
from fedjax_llm.federation.summing import Summed, no_ints, sent_by_all
from fedjax_llm.federation.waiting import kept, landed
from fedjax_llm.lora import add_dense

PyTree = Any


class RoundPrograms:
    """The compiled programs for the rounds of one phase.

    Args:
        recipe: what to build.
        phase: of the rule.
        codecs: fixed point of the message of each stage.
    """

    def __init__(self, recipe: Recipe, phase: int, codecs: tuple[MessageCodec, ...]) -> None:
        self._recipe, self._phase, self.codecs = recipe, phase, codecs
        self._server = Server(recipe, phase, codecs)
        self._client = Client(
            recipe.training,
            recipe.rule,
            phase,
            codecs,
            recipe.rows_loss,
            recipe.by_loss,
            recipe.normalised,
            recipe.reads_messages,
            recipe.ranks_differ,
            recipe.steps_differ,
            recipe.batches_differ,
            recipe.replicas,
            recipe.compressor,
        )
        self.train = jax.jit(self._train)
        self.train_and_send = jax.jit(self._train_and_send, static_argnames="summed")
        self.weigh = jax.jit(self._weigh)
        self.send = jax.jit(self._send, static_argnums=0, static_argnames="summed")
        self.between = jax.jit(self._server.between, static_argnums=0)
        self.by_cloud = jax.jit(self._server.by_cloud)
        self.inverse_weight = jax.jit(_inverse_weight)
        self.apply = jax.jit(self._apply)
        self.round = jax.jit(self._round)
        self.last_round = jax.jit(self._round, donate_argnums=(1, 2))
        everywhere = recipe.layout.everywhere
        self.kept = jax.jit(lambda *given: everywhere(kept(*given)))
        self.landed = jax.jit(lambda *given: everywhere(landed(*given)))
        self.total = jax.jit(self._server.total)

    @property
    def stages(self) -> int:
        """Sums of messages."""
        return len(self.codecs)

    @property
    def results_needed(self) -> bool:
        """Whether what clients trained is read again after their first message."""
        recipe = self._recipe
        return recipe.sums_weights or self.stages > 1 or recipe.measures_error

    @property
    def leaves_cloud(self) -> Summed:
        """How messages are summed inside the clouds, before a sum between them."""
        recipe = self._recipe
        several = len(set(recipe.clouds)) < len(recipe.clouds)
        return "cloud" if several and recipe.attackers is None else "each"

    @property
    def _reaches_server(self) -> Summed:
        recipe = self._recipe
        return "each" if recipe.reads_messages or recipe.attackers is not None else "server"

    # What clients do.

    def _shared(self, base: PyTree, state: Global, number: jax.Array, seed: jax.Array) -> Shared:
        control = state.control[self._phase] if state.control else ()
        residual = state.server.residual
        if base and residual:
            base = add_dense(base, residual)
        # Messages are written without the base, and without what is as large.
        server = state.server._replace(residual={})
        return Shared(base, server, number, control, seed, state.clip, state.compression)

    def _train(
        self,
        base: PyTree,
        state: Global,
        clients: ClientInputs,
        seed: jax.Array,
        number: jax.Array,
    ) -> Local:
        shared = self._shared(base, state, number, seed)
        one = self._client
        idle, layout = one.idle if one.may_idle else None, self._recipe.layout
        local: Local = layout.map_clients(one.train, idle)(shared, clients)
        # Read on the host, which may hold some of the devices only.
        return local._replace(metrics=layout.everywhere(local.metrics))

    def _train_and_send(
        self,
        base: PyTree,
        state: Global,
        clients: ClientInputs,
        seed: jax.Array,
        number: jax.Array,
        summed: Summed = "each",
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

        def idle(client: ClientInputs, shapes: PyTree) -> tuple[jax.Array, PyTree]:
            nothing, local = self._client.idle(client, shapes[0])
            message = jax.tree.map(_zeros, shapes[1])
            return nothing, (local, message._replace(memory=client.state.memory))

        may_idle = self._client.may_idle
        local, message = sent_by_all(self._recipe, one, idle if may_idle else None, summed)(
            shared, clients
        )
        # Read on the host, which may hold some of the devices only.
        everywhere = self._recipe.layout.everywhere
        local = local._replace(metrics=everywhere(local.metrics))
        return local, message._replace(norm=everywhere(message.norm))

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

        shared, layout = self._shared({}, state, number, seed), self._recipe.layout
        limbs_Kx4: jax.Array = layout.map_clients(one)(shared, (clients.without_rows(), local))
        # Read on the host, which may hold some of the devices only.
        return layout.everywhere(limbs_Kx4)

    def _send(
        self,
        stage: int,
        state: Global,
        clients: ClientInputs,
        local: Local,
        sums: Sums,
        seed: jax.Array,
        number: jax.Array,
        summed: Summed = "each",
    ) -> EncodedMessage:
        layout, client = self._recipe.layout, self._client
        clients, shared = clients.without_rows(), self._shared({}, state, number, seed)
        attackers = self._recipe.attackers
        if attackers is not None:
            return attacked(attackers, layout, client, stage, shared, clients, local, sums)

        def one(
            everything: tuple[Shared, Sums], pair: tuple[ClientInputs, Local]
        ) -> tuple[tuple[()], EncodedMessage]:
            shared, sums = everything
            return (), client.send(stage, shared, *pair, sums.public, sums.inverse_weight)

        message: EncodedMessage = sent_by_all(self._recipe, one, None, summed)(
            (shared, sums), (clients, local)
        )[1]
        return message._replace(norm=layout.everywhere(message.norm))

    # What the server does with it.

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
        """`Server.apply` with the clients' shares, which follow from their weights."""
        shares_K = self._shares(clients, local, state, sums, seed, number)
        applied = self._server.apply(
            total, inverse, state, clients, local, shares_K, sums.public, seed, number
        )
        # It is the next round's state, which the host saves.
        return self._recipe.layout.everywhere(applied)

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

    # Both in one program.

    def _round(
        self,
        base: PyTree,
        state: Global,
        own: ClientState,
        clients: ClientInputs,
        inverse: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[Applied, Local, EncodedMessage, jax.Array]:
        """A whole round: the server, what clients carry on, norms, and limbs of weights.

        `own` is what `clients` carry, by itself so that it can be given away.
        """
        barrier = jax.lax.optimization_barrier
        clients, summed = clients._replace(state=own), self._reaches_server

        def total_of(message: EncodedMessage) -> jax.Array:
            if summed == "each":
                return barrier(self._server.total(message.ints_P))
            return barrier(message.ints_P)

        sums = Sums()
        limbs_Kx4 = jnp.zeros((0, WeightCodec.LIMBS), jnp.int32)
        if self._recipe.sums_weights:
            local = barrier(self._train(base, state, clients, seed, number))
            limbs_Kx4 = barrier(self._weigh(state, clients, local, seed, number))
            total_4 = barrier(jnp.sum(limbs_Kx4, axis=0, dtype=jnp.int32))
            sums = Sums(inverse_weight=barrier(_inverse_weight(total_4)))
            sent = barrier(self._send(0, state, clients, local, sums, seed, number, summed))
        else:
            local, sent = barrier(self._train_and_send(base, state, clients, seed, number, summed))
        first = sent
        for stage in range(1, self.stages):
            total_P = total_of(sent)
            public = barrier(self._server.between(stage - 1, total_P, inverse, state, seed, number))
            sums = sums._replace(public=public)
            sent = barrier(self._send(stage, state, clients, local, sums, seed, number, summed))
        total = total_of(sent)
        applied = self._apply(total, inverse, state, clients, local, sums, seed, number)
        # The individual messages and results stay inside the program.
        first = first._replace(ints_P=no_ints(), memory=())
        local = local._replace(after={}, control=(), state=remembered(local.state, sent))
        # Read on the host; a barrier lies where its other readers want it.
        read = (local.metrics, first.norm, limbs_Kx4)
        metrics, norm, limbs_Kx4 = self._recipe.layout.everywhere(read)
        return applied, local._replace(metrics=metrics), first._replace(norm=norm), limbs_Kx4


def remembered(clients: ClientState, message: EncodedMessage) -> ClientState:
    """What clients carry on after their last message of a round."""
    return clients._replace(memory=message.memory)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _inverse_weight(total_4: jax.Array) -> jax.Array:
    """One over the sum of weights; the sum is above 0, see `WeightCodec.check`."""
    return 1 / WeightCodec.decode(total_4)
