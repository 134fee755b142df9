"""A device's clients, one group after the other, and the rows of the next that come meanwhile.

A group is one `vmap`, and the groups are a `scan`. What of the clients lies in the host's memory
(by the type of its arrays; see `CohortLayout.shard`) is never on the device as a whole: the scan
carries the rows of the group that computes, and each turn of it starts the copy of the next ones
beside that, in the same branch of the program, where a compiler can let the two run at a time.

Notation: K' clients of a device, G clients a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm_kernels.lockstep import in_step

PyTree = Any
OneClient = Callable[[PyTree, PyTree], PyTree]
# `(client, shapes of a result) -> (bool, result)`, see `CohortLayout.map_clients`.
Idle = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


def over_groups(
    one_client: OneClient,
    idle: Idle | None,
    shared: PyTree,
    clients: PyTree,
    *,
    group: int,
    busy_first: bool,
    start: PyTree,
    add: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
) -> tuple[PyTree, PyTree]:
    """Computes all clients of a device, inside its program.

    Rows in the host's memory are copied once a round, those of one group twice: the last turn finds
    no next group, and copies its own again. Where clients stand in order (with `busy_first`, or one
    by one), no rows are copied of those that wait but for the first behind the others.

    Args:
        one_client: `(shared, client) -> result`.
        idle: whether a client has nothing to do, and its result then; None where all have.
        shared: the same for all.
        clients: leaves [K', ...].
        group: G, divides K'.
        busy_first: whether those stand together that have something to do.
        start: of what is carried from group to group.
        add: `(carry, clients of a group, results) -> (carry, results to keep)`.

    Returns:
        What is carried in the end, and the kept results with leaves [K', ...].
    """
    near, far = _apart(clients)
    order = None
    # A group of one is left out wherever it stands; but the rows of who waits would be copied.
    if idle is not None and (bool(far.leaves) if group == 1 else busy_first):
        order = _Order.of(one_client, idle, shared, clients)
    count = jax.tree.leaves(clients)[0].shape[0] // group
    run = _of_a_group(one_client, idle, shared, order is not None)

    def step(carried: tuple[PyTree, list[jax.Array]], turn: tuple[PyTree, jax.Array]) -> PyTree:
        (carry, rows), (taken, number) = carried, turn
        members = far.joined(taken if order is None else order.taken(near, taken), rows)
        following = jnp.minimum(number + jnp.int32(1), jnp.int32(count - 1))
        results, rows = run(members, rows, lambda: far.bring(following, group, order))
        carry, kept = add(carry, members, results)
        return (carry, rows), kept

    where = near if order is None else order.order_K
    in_groups = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), where)
    first = far.bring(jnp.int32(0), group, order)
    turns = (in_groups, jnp.arange(count, dtype=jnp.int32))
    (carry, _), kept = jax.lax.scan(step, (start, first), turns)
    in_a_row = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)
    return carry, in_a_row if order is None else order.back(in_a_row)


def shapes_of_one(clients: PyTree) -> PyTree:
    """Of one client on the device, from leaves with a leading axis of clients, wherever they lie.

    By taking one of them, so that all that JAX knows of a type is there: what is compiled by itself
    is then traced for the shapes of its results and not again for the clients.
    """

    def first(leaf: jax.Array) -> jax.Array:
        one = jax.lax.index_in_dim(leaf, 0, keepdims=False)
        return jax.device_put(one, jax.memory.Space.Device) if _on_host(leaf) else one

    return jax.eval_shape(lambda clients: jax.tree.map(first, clients), clients)


class _Order(NamedTuple):
    """Who stands where: int32 [K'] each, the places in turn and the way back."""

    order_K: jax.Array
    back_K: jax.Array

    @classmethod
    def of(cls, one_client: OneClient, idle: Idle, shared: PyTree, clients: PyTree) -> "_Order":
        """Those first that have something to do, otherwise as they stood."""
        shapes = jax.eval_shape(one_client, shared, shapes_of_one(clients))
        idles_K = jax.vmap(lambda client: idle(client, shapes)[0])(clients)
        order_K = jnp.argsort(idles_K, stable=True)
        return cls(order_K, jnp.argsort(order_K))

    def taken(self, clients: PyTree, places_G: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[places_G], clients)

    def back(self, results: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[self.back_K], results)


@dataclass(frozen=True)
class _Far:
    """The leaves of `clients` in the host's memory, and their places among all of them."""

    treedef: Any
    places: tuple[int, ...]
    leaves: tuple[jax.Array, ...]

    def bring(self, number: jax.Array, group: int, order: _Order | None) -> list[jax.Array]:
        """A group's rows on the device; `number` is the group's place, int32.

        Devices fetch a stretch of the host's memory, and do not gather there: clients that do not
        stand together there come one by one.
        """
        first = number * jnp.int32(group)

        def here(leaf: jax.Array, place: jax.Array, count: int) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(leaf, place, count)
            return jax.device_put(part, jax.memory.Space.Device)

        if order is None:
            return [here(leaf, first, group) for leaf in self.leaves]
        places_G = jax.lax.dynamic_slice_in_dim(order.order_K, first, group)
        return [
            jnp.concatenate([here(leaf, places_G[g], 1) for g in range(group)])
            for leaf in self.leaves
        ]

    def joined(self, near: list[jax.Array], rows: list[jax.Array]) -> PyTree:
        """The clients' tree, of leaves that are all on the device."""
        leaves = list(near)
        for place, leaf in zip(self.places, rows, strict=True):
            leaves.insert(place, leaf)
        return jax.tree.unflatten(self.treedef, leaves)


def _apart(clients: PyTree) -> tuple[list[jax.Array], _Far]:
    """The leaves on the device, and those in the host's memory."""
    leaves, treedef = jax.tree.flatten(clients)
    places = tuple(i for i, leaf in enumerate(leaves) if _on_host(leaf))
    near = [leaf for i, leaf in enumerate(leaves) if i not in places]
    return near, _Far(treedef, places, tuple(leaves[i] for i in places))


def _on_host(leaf: jax.Array) -> bool:
    return bool(jax.typeof(leaf).memory_space == jax.memory.Space.Host)


def _of_a_group(
    one_client: OneClient, idle: Idle | None, shared: PyTree, sorted_: bool
) -> Callable[..., tuple[PyTree, PyTree]]:
    """The clients of a group as one batch, which is left out if none has anything to do.

    The function returned is `(group, rows, following) -> (results, rows of the next)`, where
    `following` copies them. They are copied where the group computes, so that both can go on at a
    time; behind a group in which nobody computes those that stand in order have nothing to do.
    """

    def every(shared: PyTree, group: PyTree) -> PyTree:
        if jax.tree.leaves(group)[0].shape[0] > 1:
            return jax.vmap(one_client, in_axes=(None, 0))(shared, group)
        # As a batch of one, its loops would ask after each turn whom of the batch it concerns, and
        # write down anew what everybody carries.
        alone = one_client(shared, jax.tree.map(lambda leaf: leaf[0], group))
        return jax.tree.map(lambda leaf: leaf[None], alone)

    # Compiled by itself it is traced once, and serves for shapes and for the branch.
    batched = jax.jit(every, inline=True)

    def run(group: PyTree, rows: PyTree, following: Callable[[], PyTree]) -> tuple[PyTree, PyTree]:
        if idle is None:
            return batched(shared, group), following()
        shapes_G = jax.eval_shape(batched, shared, group)
        idles_G, results_G = jax.vmap(lambda client: idle(client, shapes_of_one(shapes_G)))(group)
        busy = in_step(jnp.any(~idles_G).astype(jnp.int32)) > 0
        found: tuple[PyTree, PyTree] = jax.lax.cond(
            busy,
            lambda: (batched(shared, group), following()),
            lambda: (results_G, rows if sorted_ else following()),
        )
        return found

    return run
