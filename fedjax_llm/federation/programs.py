"""The compiled programs of a round: one when the sum stays on the devices, two when it does not.

    plain:      (base, server, clients) -> train -> sum -> apply -> server
    encrypted:  (base, server, clients) -> train -> integers | host | integers -> apply -> server

The pieces are the same functions, kept apart by optimisation barriers where they share a program,
so that XLA cannot fuse across the sum and the two roads end in the same bytes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.federation.cohort import (
    ClientInputs,
    ClientOutputs,
    CohortLayout,
    RowLossOfBase,
    train_cohort,
)
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.message import MessageCodec
from fedjax_llm.privacy import gaussian_noise_like
from fedjax_llm.training import LocalTraining

PyTree = Any


class Applied(NamedTuple):
    """The server's state after a round and the l2 norm of the adapter's change."""

    server: ServerState
    update_norm: jax.Array


class RoundPrograms:
    """Compiled `train`, `apply` and, for a sum on the devices, the whole `round`.

    Args:
        layout: where clients run.
        training: the local update.
        rule: trainable part, message and server step.
        codec: fixed point of the messages.
        row_loss: `(base, adapter, row) -> loss in nats`.
        server_noise_stddev: standard deviation of the Gaussian noise that the server adds to each
            coordinate of the *sum*; 0 where the clients' messages are private already.
    """

    def __init__(
        self,
        layout: CohortLayout,
        training: LocalTraining,
        rule: AggregationRule,
        codec: MessageCodec,
        row_loss: RowLossOfBase,
        server_noise_stddev: float,
    ) -> None:
        train = train_cohort(layout, training, rule, codec, row_loss)

        def apply(
            total_P: jax.Array,
            divisor: jax.Array,
            server: ServerState,
            seed: jax.Array,
            round_index: jax.Array,
        ) -> Applied:
            sum_P = codec.decode(total_P)
            if server_noise_stddev > 0:
                key = key_for(seed, Purpose.SERVER_NOISE, round_index)
                sum_P = sum_P + gaussian_noise_like(key, sum_P, server_noise_stddev)
            before = rule.trainable(server.adapter)
            after = rule.apply(codec.unravel(sum_P / divisor), server)
            change = jax.tree.map(jnp.subtract, rule.trainable(after.adapter), before)
            squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(change)]
            return Applied(after, jnp.sqrt(jnp.sum(jnp.stack(squares))))

        def whole_round(
            base: PyTree,
            server: ServerState,
            clients: ClientInputs,
            divisor: jax.Array,
            seed: jax.Array,
            round_index: jax.Array,
        ) -> tuple[Applied, ClientOutputs]:
            outputs = train(base, server.adapter, clients, seed, round_index)
            outputs = jax.lax.optimization_barrier(outputs)
            # Integers: the order of the clients and the number of devices cannot change a bit.
            total_P = jnp.sum(outputs.message.ints_P, axis=0, dtype=jnp.int32)
            total_P = jax.lax.optimization_barrier(total_P)
            applied = apply(total_P, divisor, server, seed, round_index)
            # The individual messages stay inside the program.
            message = outputs.message._replace(ints_P=jnp.zeros((0,), jnp.int32))
            return applied, outputs._replace(message=message)

        self.train = jax.jit(train)
        self.apply = jax.jit(apply)
        self.round = jax.jit(whole_round)
