"""An aggregation rule is three pure functions: what is kept, what is sent, how the sum is applied.

Everything a client sends is *added* to what the others send. A rule whose messages cannot be
added (a median, say) states `needs_individual_messages`, and a run that asks for it together
with a secure sum is refused when the run file is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.lora import Adapter
from fedjax_llm.training import optimizer_init, optimizer_step

PyTree = Any


class ServerState(NamedTuple):
    """What the server carries from round to round.

    Attributes:
        adapter: the global adapter.
        optimizer: the server optimiser's state, over the trainable part.
    """

    adapter: Adapter
    optimizer: PyTree


@dataclass(frozen=True)
class AggregationRule:
    """How local results become the next global adapter.

    Attributes:
        name: the name in the run file.
        source: the paper.
        exact: whether the mean of the messages applied to the global adapter is the mean of the
            clients' low-rank products B@A (and not a product of means).
        needs_individual_messages: whether the rule must see each message, which no secure sum
            allows.
        trainable: takes from an adapter the pytree that clients train and send.
        replace: puts such a pytree back into an adapter.
        optimizer: the server's optax transformation; it receives the negated mean message as
            its gradient (arXiv 2003.00295, algorithm 2), so `optax.sgd(1.0)` is FedAvg.
    """

    name: str
    source: str
    exact: bool
    needs_individual_messages: bool
    trainable: Callable[[Adapter], PyTree]
    replace: Callable[[Adapter, PyTree], Adapter]
    optimizer: optax.GradientTransformation

    def init(self, adapter: Adapter) -> ServerState:
        """Returns the server's state before the first round."""
        return ServerState(adapter, optimizer_init(self.optimizer, self.trainable(adapter)))

    def message(self, before: PyTree, after: PyTree) -> PyTree:
        """Returns what a client sends: the change of the trainable tree, same shapes."""
        return jax.tree.map(jnp.subtract, after, before)

    def apply(self, mean_message: PyTree, state: ServerState) -> ServerState:
        """Applies the mean of the clients' messages.

        Args:
            mean_message: the sum of the messages divided by the sum of their weights.
            state: the server's state that was broadcast.
        """
        current = self.trainable(state.adapter)
        gradient = jax.tree.map(jnp.negative, mean_message)
        after, optimizer = optimizer_step(self.optimizer, gradient, state.optimizer, current)
        return ServerState(self.replace(state.adapter, after), optimizer)
