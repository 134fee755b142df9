"""Messages that wait for the step that takes them, in slots; see `pending`.

Notation: S slots, K clients, P integers of a message.
"""

import jax
import jax.numpy as jnp


def kept(
    pending_SxKxP: jax.Array, ints_KxP: jax.Array, slot_K: jax.Array, sends_K: jax.Array
) -> jax.Array:
    """The messages that have not landed, with those of a wave among them."""
    clients = jnp.arange(slot_K.shape[0])
    own_KxP = pending_SxKxP[slot_K, clients]
    new_KxP = jnp.where(sends_K[:, None], ints_KxP[: slot_K.shape[0]], own_KxP)
    return pending_SxKxP.at[slot_K, clients].set(new_KxP)


def landed(pending_SxKxP: jax.Array, slot_K: jax.Array, lands_K: jax.Array) -> jax.Array:
    """The messages that land, int32 [K, P]; zeros of the others."""
    own_KxP = pending_SxKxP[slot_K, jnp.arange(slot_K.shape[0])]
    return jnp.where(lands_K[:, None], own_KxP, 0)
