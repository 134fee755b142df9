"""How messages leave the clients' part of a program: each by itself, or added up as they are made.

Where only a sum is wanted it grows while the clients follow each other, and no message outlives its
group.

Notation: K' clients with padding, P numbers of a message, C clouds, G groups of clouds.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.federation.message import EncodedMessage
from fedjax_llm.federation.recipe import Recipe

PyTree = Any
# Each by itself, added up as the server wants them (in all or by group), or by cloud.
Summed = Literal["each", "server", "cloud"]


def sent_by_all(
    recipe: Recipe,
    one: Callable[..., tuple[PyTree, EncodedMessage]],
    idle: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]] | None,
    summed: Summed,
) -> Callable[..., tuple[PyTree, EncodedMessage]]:
    """Results and messages of all clients.

    The integers are [K', P], or sums: [P] in all, [G, P] by group, [C, P] by cloud.

    Args:
        recipe: layout, clouds and groups.
        one: `(shared, client) -> (result, message)`.
        idle: what a client that has nothing to do gives in place of it, see `Client.idle`; None if
            all have.
        summed: how messages leave.
    """
    layout = recipe.layout
    if summed == "each":
        return layout.map_clients(one, idle, recipe.sampled)
    part_of = recipe.clouds if summed == "cloud" else recipe.groups

    def split(shared: PyTree, client: PyTree) -> tuple[PyTree, jax.Array]:
        result, message = one(shared, client)
        return (result, message._replace(ints_P=no_ints())), message.ints_P

    def idle_split(client: PyTree, shapes: PyTree) -> tuple[jax.Array, PyTree]:
        assert idle is not None
        (result, message), ints_P = shapes
        nothing, (result, message) = idle(client, (result, message._replace(ints_P=ints_P)))
        return nothing, ((result, message._replace(ints_P=no_ints())), message.ints_P)

    def of_all(shared: PyTree, clients: PyTree) -> tuple[PyTree, EncodedMessage]:
        part_K, parts = _padded_parts(part_of, layout.padded)
        mapped = layout.sum_clients(split, parts, idle_split if idle else None, recipe.sampled)
        (results, message), sums_CxP = mapped(shared, clients, part_K)
        return results, message._replace(ints_P=sums_CxP[0] if part_of is None else sums_CxP)

    return of_all


def no_ints() -> jax.Array:
    """In the place of integers that have been added up."""
    return jnp.zeros((), jnp.int32)


def _padded_parts(part_of: Sequence[int] | None, padded: int) -> tuple[jax.Array, int]:
    """To which sum each of K' clients adds, int32, and how many sums there are."""
    part_K = np.zeros(padded, np.int32)
    if part_of is None:
        return jnp.asarray(part_K), 1
    part_K[: len(part_of)] = part_of
    return jnp.asarray(part_K), max(part_of) + 1
