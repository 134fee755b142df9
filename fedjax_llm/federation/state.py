"""All that changes from round to round, as one pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.aggregation.part import subset
from fedjax_llm.aggregation.robust import Combine, GroupRobust
from fedjax_llm.federation.client_values import ClientState
from fedjax_llm.federation.cohort import begins_anew
from fedjax_llm.federation.compressor import Compressor
from fedjax_llm.federation.keys import Purpose, Seeds, key_for
from fedjax_llm.federation.recipe import Global
from fedjax_llm.lora import Adapter, LoraConfig, init_adapter
from fedjax_llm.models import DecoderConfig
from fedjax_llm.privacy import AdaptiveClip, Correlation
from fedjax_llm.training import LocalTraining, optimizer_init

PyTree = Any


class FederationState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        round: int32 scalar, rounds done.
        server: adapter, server optimiser and memory of the rule.
        clients: what the clients carry, leaves [K, ...] in their order.
        control: the global control variate of each phase; () without SCAFFOLD.
        combine: memory of a robust combination; () for most.
        noise: what the server's correlated noise keeps; () without.
        clip: the adaptive clip norm of messages; () without.
        compression: the codec's public state; () without.
        pending: int32 [slots, K, P], messages that have not landed yet; () where all wait.
    """

    round: jax.Array
    server: ServerState
    clients: ClientState
    control: tuple[PyTree, ...] = ()
    combine: PyTree = ()
    noise: PyTree = ()
    clip: PyTree = ()
    compression: PyTree = ()
    pending: PyTree = ()

    @property
    def globals(self) -> Global:
        """What the server holds."""
        return Global(
            self.server, self.control, self.combine, self.noise, self.clip, self.compression
        )


def init_state(
    config: DecoderConfig,
    lora: LoraConfig,
    rule: AggregationRule,
    training: LocalTraining,
    seed: jax.Array | Seeds,
    clients: int,
    combine: Combine | GroupRobust | None = None,
    server_noise: Correlation | None = None,
    adaptive: AdaptiveClip | None = None,
    replicas: bool = False,
    compressor: Compressor | None = None,
    pending: tuple[int, int] | None = None,
) -> FederationState:
    """Returns the state before the first round, a function of its arguments alone.

    Args:
        config: of the model.
        lora: of the adapter.
        rule: of aggregation.
        training: of the clients.
        seed: the run's key.
        clients: K.
        combine: a robust combination, which may keep something.
        server_noise: which may keep something.
        adaptive: the clip norm of messages that moves.
        replicas: whether clients train on from their own copy.
        compressor: how messages are shortened.
        pending: slots and integers of a message, where messages wait for their step.
    """
    server = rule.init(init_adapter(config, lora, key_for(seed, Purpose.ADAPTER_INIT)))
    phases = [rule.trainable(server, phase) for phase in range(len(rule.phases))]
    kept = subset(phases[0], rule.kept) if rule.kept else {}
    control: tuple[PyTree, ...] = ()
    if training.drift.control:
        control = tuple(jax.tree.map(jnp.zeros_like, part) for part in phases)
    client = ClientState(
        tuple(
            () if begins_anew(rule, training) else optimizer_init(training.optimizer, part)
            for part in phases
        ),
        kept,
        control,
        _noise_of(training, phases[0]),
        () if training.privacy is None else training.privacy.clip_state(),
        phases[0] if replicas else (),
        () if compressor is None else compressor.memory(),
    )
    message = rule.messages(server, 0)[0][0]
    size = sum(leaf.size for leaf in jax.tree.leaves(message))
    memory = () if combine is None else combine.init(size)
    noise: PyTree = ()
    if server_noise is not None:
        # Control variates travel, and are noised, with the message.
        extra = sum(leaf.size for leaf in jax.tree.leaves(phases[0])) if control else 0
        noise = server_noise.init(jnp.zeros((size + extra,), jnp.float32))
    return FederationState(
        jnp.int32(0),
        server,
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *jnp.shape(leaf))), client),
        control,
        memory,
        noise,
        () if adaptive is None else adaptive.init(),
        () if compressor is None else compressor.init(),
        () if pending is None else jnp.zeros((pending[0], clients, pending[1]), jnp.int32),
    )


def _noise_of(training: LocalTraining, part: PyTree) -> PyTree:
    """What a client's correlated noise keeps; rules with it have one phase."""
    privacy = training.privacy
    if privacy is None or privacy.correlation is None:
        return ()
    return privacy.correlation.init(part)


def adapter_of(rule: AggregationRule, state: FederationState, client: int | None) -> Adapter:
    """The adapter that a client's model runs with; the global one if None.

    They differ for rules by which a client keeps a part to itself.
    """
    if client is None or not rule.kept:
        return state.server.adapter
    own = jax.tree.map(lambda leaf: leaf[client], state.clients.kept)
    return rule.adapter(state.server, own)
