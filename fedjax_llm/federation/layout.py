"""Where the clients of a run are computed: groups, devices, the mesh axis `clouds`.

Clients are laid out in groups. A group is one `vmap`; a device runs its groups one after the
other in a `scan`; devices share the groups along the mesh axis `clouds`. The size of a group, and
with it every shape inside the program, does not depend on the number of devices: that is why one
device and two give the same bytes.

Notation: K clients, padded to K' = devices x groups a device x G clients a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXIS = "clouds"


@dataclass(frozen=True)
class CohortLayout:
    """Where the K clients of a run are computed.

    Attributes:
        mesh: one axis, `clouds`.
        clients: K.
        group: clients in one vmap, G. Memory grows with it, the result's bytes depend on it.
    """

    mesh: Mesh
    clients: int
    group: int

    @classmethod
    def over(
        cls, clients: int, group: int | None = None, devices: Sequence[jax.Device] | None = None
    ) -> "CohortLayout":
        """Lays `clients` out over `devices` (all by default).

        Without `group`, a CPU takes one client at a time, because there batching removes
        overhead and not arithmetic, and an accelerator takes up to eight.
        """
        devices = list(devices or jax.devices())
        if group is None:
            group = 1 if devices[0].platform == "cpu" else min(clients, 8)
        mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        return cls(mesh, clients, group)

    @property
    def padded(self) -> int:
        """K', the clients that are computed; those beyond K take no part in the sum."""
        unit = self.mesh.size * self.group
        return -(-self.clients // unit) * unit

    def shard(self, tree: PyTree) -> PyTree:
        """Pads host arrays [K, ...] with zeros to K' and spreads them over the devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def place(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            width = [(0, self.padded - self.clients)] + [(0, 0)] * (leaf.ndim - 1)
            return jax.device_put(np.pad(leaf, width), sharding)

        return jax.tree.map(place, tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts a copy of `tree` on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def spread(self, tree: PyTree) -> PyTree:
        """As `shard`, for arrays that are on the devices already, and without the host."""
        return self._spread(self.replicate(tree))

    @cached_property
    def _spread(self) -> Callable[[PyTree], PyTree]:
        def padded(tree: PyTree) -> PyTree:
            extra = self.padded - self.clients
            return jax.tree.map(
                lambda leaf: jnp.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1)), tree
            )

        if self.mesh.size == 1 and self.padded == self.clients:
            return lambda tree: tree
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.jit(padded, out_shardings=sharding)

    def collect(self, tree: PyTree) -> PyTree:
        """The inverse of `spread`: the clients without padding, whole on every device."""
        return self._collect(tree)

    @cached_property
    def _collect(self) -> Callable[[PyTree], PyTree]:
        if self.mesh.size == 1 and self.padded == self.clients:
            return lambda tree: tree
        return jax.jit(self.gathered)

    def gathered(self, tree: PyTree) -> PyTree:
        """Inside a program: the clients' results without padding, whole on every device.

        What is computed from it then has the same shapes, hence the same bytes, on any number of
        devices; a sum of floats over clients that are spread has not.
        """
        return self.everywhere(jax.tree.map(lambda leaf: leaf[: self.clients], tree))

    def everywhere(self, tree: PyTree) -> PyTree:
        """Inside a program: the same on every device, as what the server does with it has to be."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def map_clients(
        self,
        one_client: Callable[..., PyTree],
        idle: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]] | None = None,
    ) -> Callable[..., PyTree]:
        """Turns a function of one client into one of all of them.

        Args:
            one_client: `(shared, client) -> result`, both pytrees.
            idle: `(client, shapes of a result) -> (bool, result)`: whether a client has nothing to
                do, and the result then. A group in which nobody has is not computed.

        Returns:
            `(shared, clients) -> results`, where the leaves of `clients` and of the results have
            a leading axis of K' entries, and `shared` is the same for all.
        """

        def on_device(shared: PyTree, clients: PyTree) -> PyTree:
            run = _of_a_group(one_client, idle, shared)
            return _in_a_row(jax.lax.map(run, self._grouped(clients)))

        return self._on_all_devices(on_device, PartitionSpec(AXIS))

    def sum_clients(
        self,
        one_client: Callable[..., tuple[PyTree, jax.Array]],
        parts: int,
        idle: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]] | None = None,
    ) -> Callable[..., tuple[PyTree, jax.Array]]:
        """As `map_clients`, for clients of which each adds integers to one of some sums.

        A group's integers are added as soon as it is through, so that memory holds those of one
        group whatever the number of clients.

        Args:
            one_client: `(shared, client) -> (result, ints_P)`, int32.
            parts: C, the sums that stay apart.
            idle: as for `map_clients`, of the pair that `one_client` returns; what is idle adds
                nothing.

        Returns:
            `(shared, clients, part_K) -> (results, sums_CxP)`: `part_K`, int32 [K'], is the sum to
            which each client adds; the sums are the same on every device.
        """

        def on_device(
            shared: PyTree, clients: PyTree, part_K: jax.Array
        ) -> tuple[PyTree, jax.Array]:
            run = _of_a_group(one_client, idle, shared)
            grouped = self._grouped((clients, part_K))

            def add(sums_CxP: jax.Array, group: PyTree) -> tuple[jax.Array, PyTree]:
                clients_G, part_G = group
                # Apart from what made them, so that they are the bits of messages that are sent.
                results_G, ints_GxP = jax.lax.optimization_barrier(run(clients_G))
                if parts == 1:
                    return sums_CxP + jnp.sum(
                        ints_GxP, axis=0, keepdims=True, dtype=jnp.int32
                    ), results_G
                member_CxG = part_G[None] == jnp.arange(parts, dtype=jnp.int32)[:, None]
                return sums_CxP + member_CxG.astype(jnp.int32) @ ints_GxP, results_G

            shape = jax.eval_shape(run, jax.tree.map(lambda leaf: leaf[0], grouped[0]))[1].shape
            start_CxP = jnp.zeros((parts, *shape[1:]), jnp.int32)
            sums_CxP, results = jax.lax.scan(add, start_CxP, grouped)
            # Integers: the order of the clients and the number of devices cannot change a bit.
            return _in_a_row(results), jax.lax.psum(sums_CxP, AXIS)

        return self._on_all_devices(on_device, (PartitionSpec(AXIS), PartitionSpec()))

    def _grouped(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, self.group, *leaf.shape[1:]), tree)

    def _on_all_devices(self, on_device: Callable[..., PyTree], out: Any) -> Callable[..., PyTree]:
        """Of functions `(shared, ...)`: what is shared is on every device, the rest is spread."""

        def mapped(shared: PyTree, *spread: PyTree) -> PyTree:
            return jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), *(PartitionSpec(AXIS) for _ in spread)),
                out_specs=out,
                # Loops inside start from constants, which the checker takes for replicated values.
                check_vma=False,
            )(shared, *spread)

        return mapped


def _in_a_row(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _of_a_group(
    one_client: Callable[..., PyTree],
    idle: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]] | None,
    shared: PyTree,
) -> Callable[[PyTree], PyTree]:
    """The clients of a group as one batch, which is left out if none has anything to do."""
    # Compiled by itself it is traced once, and serves for shapes and for the branch.
    batched = jax.jit(jax.vmap(one_client, in_axes=(None, 0)), inline=True)

    def run(group: PyTree) -> PyTree:
        if idle is None:
            return batched(shared, group)
        shapes_G = jax.eval_shape(batched, shared, group)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes_G
        )
        idles_G, results_G = jax.vmap(lambda client: idle(client, shapes))(group)
        return jax.lax.cond(jnp.all(idles_G), lambda: results_G, lambda: batched(shared, group))

    return run
