"""Replicas: what clients train on from cycle to cycle where they do not wait for the global model.

Notation: L layers, P fragments.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import Part


def fragment_of_layer(layers: int, fragments: int) -> tuple[int, ...]:
    """The fragment of each layer: every P-th layer is of one (arXiv 2501.18512, section 2.1).

    >>> fragment_of_layer(5, 2)
    (0, 1, 0, 1, 0)
    """
    return tuple(layer % fragments for layer in range(layers))


@dataclass(frozen=True)
class Replicas:
    """How a client goes on from its own copy.

    Attributes:
        mixing: alpha of arXiv 2501.18512, section 2.2: what the replica keeps of itself where a
            fragment comes back.
        fragments: P.
    """

    mixing: float
    fragments: int

    def start(self, replica: Part, received: Part, fresh: jax.Array, merged_P: jax.Array) -> Part:
        """Where a cycle begins: the replica, mixed with the fragments that have come back.

        Args:
            replica: as the client left it, leaves [L, ...].
            received: the global values that it has received last.
            fresh: bool, whether there is no replica: then it begins with the global values.
            merged_P: bool, the fragments that came back since.
        """
        keep = jnp.float32(self.mixing)

        def one(own: jax.Array, global_: jax.Array) -> jax.Array:
            layers = jnp.array(fragment_of_layer(own.shape[0], self.fragments), jnp.int32)
            shape = (-1,) + (1,) * (own.ndim - 1)
            here = merged_P[layers].reshape(shape)
            mixed = keep * own + (1 - keep) * global_
            return jnp.where(fresh, global_, jnp.where(here, mixed, own))

        return jax.tree.map(one, replica, received)
