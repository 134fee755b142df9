"""Where the clients of a run are computed: groups, devices, the axes of the mesh.

Clients are laid out in groups. A group is one `vmap`; a device runs its groups one after the
other in a `scan`; devices share the groups along the axes `clouds` and `data` (see `mesh`). The
size of a group, and with it every shape inside the program, does not depend on the number of
devices: that is why one device and two give the same bytes (of clients that are sampled, which
stand together on each device, the same up to rounding). Along `model` the compiler divides the
products of one client, and their sums are rounded in another order.

All of it holds where devices belong to several processes, each of which runs the same programs:
an array from the host is given to each device by its own process, and what the host reads is on
every device.

Notation: K clients, padded to K' = devices x groups a device x G clients a group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_llm.errors import UserError
from fedjax_llm.federation.groups import Idle, over_groups, shapes_of_one
from fedjax_llm.federation.mesh import SPREAD, MeshShape
from fedjax_llm.lora import Adapter, LowRank
from fedjax_llm.models import DecoderConfig
from fedjax_llm.models.sharding import MODEL, adapter_specs, base_specs
from fedjax_llm.models.spread import manual_specs, spread
from fedjax_llm_kernels.lockstep import DATA

PyTree = Any
# Where arrays lie: the memory of the devices that compute with them, or of their hosts.
Memory = Literal["device", "host"]
_HOST = "pinned_host"
# Of what is spread over the devices, client by client or row by row.
CLIENTS = PartitionSpec(SPREAD)


def check_host_memory(devices: Sequence[jax.Device]) -> None:
    """Refuses devices that cannot fetch from their host's memory inside a program.

    Raises:
        UserError: as said.
    """
    for device in devices:
        if _HOST not in {memory.kind for memory in device.addressable_memories()}:
            raise UserError(
                f'[devices] rows = "host": devices of kind {device.device_kind!r} cannot fetch '
                'from the memory of their host; set rows = "device"'
            )


@dataclass(frozen=True)
class CohortLayout:
    """Where the K clients of a run are computed.

    Attributes:
        mesh: axes `clouds`, `data` and `model`.
        clients: K.
        group: clients in one vmap, G. Memory grows with it, the result's bytes depend on it.
    """

    mesh: Mesh
    clients: int
    group: int

    @classmethod
    def over(
        cls,
        clients: int,
        group: int = 1,
        devices: Sequence[jax.Device] | None = None,
        shape: MeshShape | None = None,
    ) -> "CohortLayout":
        """Lays `clients` out over `devices` (all by default), along `clouds` without a `shape`.

        Raises:
            UserError: devices that the shape does not divide.
        """
        return cls((shape or MeshShape()).over(list(devices or jax.devices())), clients, group)

    @property
    def places(self) -> int:
        """Groups that are computed at a time."""
        return math.prod(self.mesh.shape[axis] for axis in SPREAD)

    @property
    def padded(self) -> int:
        """K', the clients that are computed; those beyond K take no part in the sum."""
        unit = self.places * self.group
        return -(-self.clients // unit) * unit

    def shard(self, tree: PyTree, memory: Memory = "device") -> PyTree:
        """Pads host arrays [K, ...] with zeros to K' and spreads them over the devices.

        Args:
            tree: of arrays, or of their shapes: then shapes are returned, as a program is lowered
                for.
            memory: "host" leaves each device's part in the memory of its host, from which
                `map_clients` and `sum_clients` fetch a group's at a time.

        Raises:
            UserError: devices that cannot read their host's memory.
        """
        if memory == "host":
            check_host_memory(self.mesh.local_devices)

        def placed(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                shape = (self.padded, *leaf.shape[1:])
                where = self._sharding(CLIENTS, memory)
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)
            leaf = np.asarray(leaf)
            extra = [(0, self.padded - self.clients)] + [(0, 0)] * (leaf.ndim - 1)
            return self._place(np.pad(leaf, extra), CLIENTS, memory)

        return jax.tree.map(placed, tree)

    def rows(self, tree: PyTree) -> PyTree:
        """Spreads host arrays over the devices; their first dimension is a multiple of `places`."""
        return jax.tree.map(lambda leaf: self._place(leaf, CLIENTS), tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts a copy of `tree` on every device."""
        return jax.tree.map(lambda leaf: self._place(leaf, PartitionSpec()), tree)

    def place_base(self, config: DecoderConfig, base: PyTree) -> PyTree:
        """Puts the frozen weights where they are used: whole, or cut along `data` and `model`.

        Raises:
            UserError: weights that cannot be cut so.
        """
        data, model = self.mesh.shape[DATA], self.mesh.shape[MODEL]
        if data == model == 1:
            return self.replicate(base)
        specs = base_specs(config, data, model, base)
        return spread(jax.tree.map(self._place, base, specs), specs)

    def cut_adapter(self, adapter: Adapter) -> Adapter:
        """Inside a client's program: its factors lie along `model` as the kernels they add to."""
        if self.mesh.shape[MODEL] == 1:
            return adapter
        specs, place = adapter_specs(list(adapter.factors)), jax.lax.with_sharding_constraint
        factors = {
            name: LowRank(*(place(own, spec) for own, spec in zip(pair, specs[name], strict=True)))
            for name, pair in adapter.factors.items()
        }
        return replace(adapter, factors=factors)

    def _sharding(self, spec: PartitionSpec, memory: Memory = "device") -> NamedSharding:
        return NamedSharding(self.mesh, spec, memory_kind=_HOST if memory == "host" else None)

    def _place(self, leaf: Any, spec: PartitionSpec, memory: Memory = "device") -> jax.Array:
        sharding = self._sharding(spec, memory)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # JAX would compare the values of all processes first, which takes as long as the transfer.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

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
        return jax.jit(padded, out_shardings=NamedSharding(self.mesh, CLIENTS))

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

    def everywhere[Tree](self, tree: Tree) -> Tree:
        """Inside a program: the same on every device, as what the server does with it has to be."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        found: Tree = jax.lax.with_sharding_constraint(tree, whole)
        return found

    def map_clients(
        self,
        one_client: Callable[..., PyTree],
        idle: Idle | None = None,
        busy_first: bool = False,
    ) -> Callable[..., PyTree]:
        """Turns a function of one client into one of all of them.

        Args:
            one_client: `(shared, client) -> result`, both pytrees.
            idle: `(client, shapes of a result) -> (bool, result)`: whether a client has nothing to
                do, and the result then. A group in which nobody has is not computed.
            busy_first: whether each device puts those together that have something to do, so that
                of few among many no group is computed for one of them. Who is in a group then
                depends on the devices.

        Returns:
            `(shared, clients) -> results`, where the leaves of `clients` and of the results have
            a leading axis of K' entries, and `shared` is the same for all.
        """

        def on_device(shared: PyTree, clients: PyTree) -> PyTree:
            return over_groups(
                one_client,
                idle,
                shared,
                clients,
                group=self.group,
                busy_first=busy_first,
                start=(),
                add=lambda carry, clients_G, results_G: (carry, results_G),
            )[1]

        return self.on_all_devices(on_device, CLIENTS)

    def sum_clients(
        self,
        one_client: Callable[..., tuple[PyTree, jax.Array]],
        parts: int,
        idle: Idle | None = None,
        busy_first: bool = False,
    ) -> Callable[..., tuple[PyTree, jax.Array]]:
        """As `map_clients`, for clients of which each adds integers to one of some sums.

        A group's integers are added as soon as it is through, so that memory holds those of one
        group whatever the number of clients.

        Args:
            one_client: `(shared, client) -> (result, ints_P)`, int32.
            parts: C, the sums that stay apart.
            idle: as for `map_clients`, of the pair that `one_client` returns; what is idle adds
                nothing.
            busy_first: as for `map_clients`.

        Returns:
            `(shared, clients, part_K) -> (results, sums_CxP)`: `part_K`, int32 [K'], is the sum to
            which each client adds; the sums are the same on every device.
        """

        # Compiled by itself it is traced once, for the length of the sums and for the clients.
        one_client = jax.jit(one_client, inline=True)

        def on_device(
            shared: PyTree, clients: PyTree, part_K: jax.Array
        ) -> tuple[PyTree, jax.Array]:
            def add(sums_CxP: jax.Array, group: PyTree, found: PyTree) -> tuple[jax.Array, PyTree]:
                # Apart from what made them, so that they are the bits of messages that are sent.
                results_G, ints_GxP = jax.lax.optimization_barrier(found)
                if parts == 1:
                    return sums_CxP + jnp.sum(
                        ints_GxP, axis=0, keepdims=True, dtype=jnp.int32
                    ), results_G
                member_CxG = group[1][None] == jnp.arange(parts, dtype=jnp.int32)[:, None]
                return sums_CxP + member_CxG.astype(jnp.int32) @ ints_GxP, results_G

            shape = jax.eval_shape(one_client, shared, shapes_of_one(clients))[1].shape
            sums_CxP, results = over_groups(
                lambda shared, pair: one_client(shared, pair[0]),
                None if idle is None else lambda pair, shapes: idle(pair[0], shapes),
                shared,
                (clients, part_K),
                group=self.group,
                busy_first=busy_first,
                start=jnp.zeros((parts, *shape), jnp.int32),
                add=add,
            )
            # Integers: the order of the clients and the number of devices cannot change a bit.
            return results, jax.lax.psum(sums_CxP, SPREAD)

        return self.on_all_devices(on_device, (CLIENTS, PartitionSpec()))

    def on_all_devices(self, on_device: Callable[..., PyTree], out: Any) -> Callable[..., PyTree]:
        """Of functions `(shared, ...)`: what is shared is on every device, the rest is spread.

        Args:
            on_device: sees a device's own part of what is spread, and of weights that are cut.
            out: the partition of its results, `CLIENTS` where they are spread.
        """
        # Axis `model` is left to the compiler; one of size 1 leaves it nothing to do.
        manual = set(SPREAD) if self.mesh.shape[MODEL] > 1 else set(self.mesh.axis_names)

        def mapped(shared: PyTree, *parts: PyTree) -> PyTree:
            return jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(manual_specs(shared), *(CLIENTS for _ in parts)),
                out_specs=out,
                axis_names=manual,
                # Loops inside start from constants, which the checker takes for replicated values.
                check_vma=False,
            )(shared, *parts)

        return mapped
