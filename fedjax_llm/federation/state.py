"""All that changes from round to round, as one pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import DecoderConfig
from fedjax_llm.training import LocalTraining, optimizer_init

PyTree = Any


class FederationState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        round: int32 scalar, rounds done.
        server: global adapter and server optimiser.
        clients: the clients' optimiser states, leaves [K, ...] in the order of the clouds.
    """

    round: jax.Array
    server: ServerState
    clients: PyTree


def init_state(
    config: DecoderConfig,
    lora: LoraConfig,
    rule: AggregationRule,
    training: LocalTraining,
    seed: jax.Array,
    clients: int,
) -> FederationState:
    """Returns the state before the first round, a function of its arguments alone."""
    adapter = init_adapter(config, lora, key_for(seed, Purpose.ADAPTER_INIT))
    optimizer = optimizer_init(training.optimizer, rule.trainable(adapter))
    return FederationState(
        jnp.int32(0),
        rule.init(adapter),
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *jnp.shape(leaf))), optimizer),
    )
