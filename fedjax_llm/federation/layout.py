"""Where the clients of a run are computed: groups, devices, the mesh axis `clouds`.

Clients are laid out in groups. A group is one `vmap`; a device runs its groups one after the
other in a `scan`; devices share the groups along the mesh axis `clouds`. The size of a group, and
with it every shape inside the program, does not depend on the number of devices: that is why one
device and two give the same bytes.

Notation: K clients, padded to K' = devices x groups a device x G clients a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
            grouped = jax.tree.map(
                lambda leaf: leaf.reshape(-1, self.group, *leaf.shape[1:]), clients
            )
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
                return jax.lax.cond(
                    jnp.all(idles_G), lambda: results_G, lambda: batched(shared, group)
                )

            results = jax.lax.map(run, grouped)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)

        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            # Loops inside start from constants, which the checker takes for replicated values.
            check_vma=False,
        )
