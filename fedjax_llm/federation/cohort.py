"""What one client does in a round, as pure functions that the layout spreads over all of them.

A client trains, then writes the message of each stage of its rule: the change, weighted, perhaps
normalised, shortened, in fixed point. It holds no key and no data of others.

Notation: K' clients with padding, P numbers of a message.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule, LocalResult, NormalisedMean, Part, Round
from fedjax_llm.aggregation.part import subset
from fedjax_llm.aggregation.weights import LossWeights
from fedjax_llm.federation.client_values import ClientInputs, ClientState, Local, Shared
from fedjax_llm.federation.compressor import Compressor
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.message import (
    EncodedMessage,
    MessageCodec,
    Upload,
    WeightCodec,
    scaled,
)
from fedjax_llm.federation.replicas import Replicas
from fedjax_llm.lora import Adapter
from fedjax_llm.training import (
    LocalTraining,
    NoiseStream,
    client_update,
    optimizer_init,
)

PyTree = Any
RowsLossOfBase = Callable[[PyTree, Adapter, PyTree], jax.Array]


@dataclass(frozen=True)
class Client:
    """The functions of one client in the rounds of one phase.

    Attributes:
        training: the local update.
        rule: what is trained and what is sent of it.
        phase: of the rule.
        codecs: fixed point of the message of each stage.
        rows_loss: `(base, adapter, rows) -> loss in nats of each row`.
        by_loss: weights that follow from the client's loss, or None.
        normalised: each message is divided by its length, or None.
        alike: messages are sent without their weight, because the server reads each.
        ranks_differ: whether some clients train fewer ranks than the adapter has.
        steps_differ: whether some take fewer local steps than others.
        batches_differ: whether some take smaller batches than others.
        replicas: how clients go on from their own copy; None where they do not.
        compressor: how messages are shortened; None where they are sent whole.
    """

    training: LocalTraining
    rule: AggregationRule
    phase: int
    codecs: tuple[MessageCodec, ...]
    rows_loss: RowsLossOfBase
    by_loss: LossWeights | None
    normalised: NormalisedMean | None
    alike: bool
    ranks_differ: bool
    steps_differ: bool = False
    batches_differ: bool = False
    replicas: Replicas | None = None
    compressor: Compressor | None = None

    def train(self, shared: Shared, client: ClientInputs) -> Local:
        """The local update of one client."""
        rule, phase = self.rule, self.phase
        before = self._start(shared, client)
        if self.replicas is not None:
            before = self.replicas.start(client.state.replica, before, client.fresh, client.merged)

        def limited(part: Part) -> Part:
            return rule.limited(before, part, client.rank) if self.ranks_differ else part

        def losses(part: Part, rows: PyTree) -> jax.Array:
            adapter = rule.adapter(shared.server, limited(part))
            return self.rows_loss(shared.base, adapter, rows)

        optimizer = client.state.optimizer[phase]
        anew = begins_anew(rule, self.training)
        if anew:
            optimizer = optimizer_init(self.training.optimizer, before)
        correction: PyTree = ()
        if self.training.drift.control:
            own = client.state.control[phase]
            correction = jax.tree.map(jnp.subtract, shared.control, own)
        trained = client_update(
            losses,
            self.training,
            before,
            optimizer,
            client.table,
            key_for(shared.seed, Purpose.EXAMPLE_SAMPLING, client.turn, client.place),
            key_for(shared.seed, Purpose.LOCAL_NOISE, client.turn, client.place),
            client.steps if self.steps_differ else None,
            correction,
            NoiseStream(
                (client.turn - jnp.int32(1)) * jnp.int32(self.training.steps),
                key_for(shared.seed, Purpose.LOCAL_NOISE, client.turn - jnp.int32(1), client.place),
                client.state.noise,
                client.state.clip,
            ),
            client.batch if self.batches_differ else None,
        )
        after = limited(trained.trainable)
        kept = subset(after, rule.kept) if rule.kept else {}
        state = ClientState(
            _replaced(client.state.optimizer, phase, () if anew else trained.optimizer),
            kept,
            client.state.control,
            client.state.noise,
            trained.clip,
            after if self.replicas is not None else (),
            client.state.memory,
        )
        control: PyTree = ()
        if self.training.drift.control:
            control = jax.tree.map(jnp.subtract, trained.gradient, client.state.control[phase])
            state = state._replace(control=_replaced(client.state.control, phase, trained.gradient))
        # Moments that are not finite would make every later message of the client zeros as well.
        sound = client.trains & _finite((after, control))
        # Noise goes on in every round, so that its steps are those by which turns are counted.
        state = _only_if(sound, state, client.state)._replace(noise=trained.noise)
        return Local(
            after,
            control,
            state,
            _only_if(client.trains, trained.metrics, _zeros(trained.metrics)),
        )

    @property
    def may_idle(self) -> bool:
        """Whether a client that takes no part has nothing to compute.

        Correlated noise goes on in every round.
        """
        privacy = self.training.privacy
        return privacy is None or privacy.correlation is None

    def idle(self, client: ClientInputs, shapes: Local) -> tuple[jax.Array, Local]:
        """Whether a client neither trains nor adds noise, and what it has then."""
        local = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        busy = client.trains
        if any(codec.noise is not None for codec in self.codecs):
            busy |= client.online
        return ~busy, local._replace(state=client.state)

    def weigh(self, shared: Shared, client: ClientInputs, local: Local) -> jax.Array:
        """The weight that follows from what the client found, int32 limbs; see `WeightCodec`."""
        weight = jnp.where(client.participates, self._weight(shared, client, local), jnp.float32(0))
        return WeightCodec.encode(weight)

    def send(
        self,
        stage: int,
        shared: Shared,
        client: ClientInputs,
        local: Local,
        public: PyTree,
        inverse_weight: jax.Array | None,
    ) -> EncodedMessage:
        """The message of a stage.

        Args:
            stage: static.
            shared: the round.
            client: inputs.
            local: what it trained.
            public: what the server made of the stage before.
            inverse_weight: one over the sum of the weights that follow from results; None where
                there is none.
        """
        own = 0 if self.compressor else stage
        tree = self.upload(
            own, shared, client, local, () if self.compressor else public, inverse_weight
        )
        return self.encoded(stage, shared, client, tree, public)

    def encoded(
        self,
        stage: int,
        shared: Shared,
        client: ClientInputs,
        tree: PyTree,
        public: PyTree,
    ) -> EncodedMessage:
        """A message compressed, shortened, in fixed point, with the client's share of noise."""
        codec, seed, whole = self.codecs[stage], shared.seed, tree
        compressor, memory = self.compressor, client.state.memory
        if compressor is not None:
            tree = compressor.encode(
                shared.compression, seed, client.lands, memory, whole, stage, public
            )
        rounding = key_for(seed, Purpose.ROUNDING, client.turn, client.place)
        message = codec.encode(tree, jax.random.fold_in(rounding, stage))
        if compressor is not None and stage == len(self.codecs) - 1:
            memory = compressor.remember(
                shared.compression, seed, client.lands, memory, whole, public,
                codec.sent(message), client.participates,
            )  # fmt: skip
        message = _only_if(client.participates, message, _zeros(message))
        message = message._replace(memory=memory)
        if codec.noise is None:
            return message
        share_P = codec.share(key_for(seed, Purpose.NOISE_SHARE, client.turn, client.place))
        share_P = jnp.where(client.online, share_P, jnp.zeros_like(share_P))
        return message._replace(ints_P=message.ints_P + share_P)

    def upload(
        self,
        stage: int,
        shared: Shared,
        client: ClientInputs,
        local: Local,
        public: PyTree,
        inverse_weight: jax.Array | None,
    ) -> Upload:
        """The message of a stage in float32, before it is shortened and rounded."""
        round_ = self.round(shared)
        result = LocalResult(self._start(shared, client), local.after, client.rank)
        message = self.rule.message(round_, result, stage, public)
        if self.normalised is not None:
            message = self.normalised.of(message)
        if not self.alike:
            message = scaled(message, self._share(shared, client, local, inverse_weight))
        upload = Upload(message, local.control if stage == 0 else ())
        if shared.clip:
            # In units of the clip norm, so that one fixed point serves whatever that is.
            upload = scaled(upload, 1 / shared.clip.clip_norm)
        return upload

    def round(self, shared: Shared) -> Round:
        """The round as the rule sees it."""
        key = key_for(shared.seed, Purpose.RULE, shared.number)
        return Round(shared.server, self.phase, shared.number, key)

    def _share(
        self, shared: Shared, client: ClientInputs, local: Local, inverse: jax.Array | None
    ) -> jax.Array:
        if inverse is None and self.by_loss is None:
            return client.weight
        weight = self._weight(shared, client, local)
        return weight if inverse is None else weight * inverse

    def _weight(self, shared: Shared, client: ClientInputs, local: Local) -> jax.Array:
        weight = client.weight
        if self.by_loss is not None:
            rows = jnp.maximum(local.metrics.rows, jnp.float32(1))
            weight = self.by_loss.weight(weight, local.metrics.loss_sum / rows)
        if self.rule.weighs_by_result:
            result = LocalResult(self._start(shared, client), local.after, client.rank)
            weight = weight * self.rule.weight(self.round(shared), result)
        return weight

    def _start(self, shared: Shared, client: ClientInputs) -> Part:
        start = self.rule.start(self.round(shared), client.rank)
        kept = client.state.kept
        return {name: sides | kept.get(name, {}) for name, sides in start.items()}


def begins_anew(rule: AggregationRule, training: LocalTraining) -> bool:
    """Whether a client's optimiser begins anew in every round."""
    return rule.new_coordinates or not training.keeps_optimizer


def _replaced(states: tuple[PyTree, ...], phase: int, state: PyTree) -> tuple[PyTree, ...]:
    return (*states[:phase], state, *states[phase + 1 :])


def _only_if(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _finite(tree: PyTree) -> jax.Array:
    """Whether the sum of squares of a tree is finite in float32."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(jnp.sum(jnp.stack(squares)))
