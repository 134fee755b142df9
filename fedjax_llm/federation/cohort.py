"""All clients of a round as one batched program over one frozen base model.

Clients are laid out in groups. A group is one `vmap`; a device runs its groups one after the
other in a `scan`; devices share the groups along the mesh axis `clouds`. The size of a group, and
with it every shape inside the program, does not depend on the number of devices: that is why one
device and two give the same bytes.

Notation: K clients, padded to K' = devices x groups a device x G clients a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.message import EncodedMessage, MessageCodec
from fedjax_llm.lora import Adapter
from fedjax_llm.training import ClientMetrics, ClientTable, LocalTraining, client_update

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

    def map_clients(self, one_client: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Turns a function of one client into one of all of them.

        Args:
            one_client: `(shared, client) -> result`, both pytrees.

        Returns:
            `(shared, clients) -> results`, where the leaves of `clients` and of the results have
            a leading axis of K' entries, and `shared` is the same for all.
        """

        def on_device(shared: PyTree, clients: PyTree) -> PyTree:
            grouped = jax.tree.map(
                lambda leaf: leaf.reshape(-1, self.group, *leaf.shape[1:]), clients
            )
            batched = jax.vmap(one_client, in_axes=(None, 0))
            results = jax.lax.map(lambda group: batched(shared, group), grouped)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)

        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            # Loops inside start from constants, which the checker takes for replicated values.
            check_vma=False,
        )


class ClientInputs(NamedTuple):
    """What the program needs of each client; every leaf has the leading axis K'.

    Attributes:
        place: int32, the client's place in the run file; addresses its randomness.
        table: its training rows.
        optimizer: its optimiser state.
        weight: float32, its public weight in the mean, in (0, 1].
        participates: bool, whether its message enters this round; the others send zeros.
    """

    place: jax.Array
    table: ClientTable
    optimizer: PyTree
    weight: jax.Array
    participates: jax.Array


class ClientOutputs(NamedTuple):
    """What each client leaves behind; every leaf has the leading axis K'.

    Attributes:
        message: fixed-point integers, zero for clients that take no part.
        optimizer: the optimiser state, unchanged for clients that take no part or diverged.
        metrics: measurements of the simulator.
    """

    message: EncodedMessage
    optimizer: PyTree
    metrics: ClientMetrics


RowLossOfBase = Callable[[PyTree, Adapter, PyTree], jax.Array]


def train_cohort(
    layout: CohortLayout,
    training: LocalTraining,
    rule: AggregationRule,
    codec: MessageCodec,
    row_loss: RowLossOfBase,
) -> Callable[[PyTree, Adapter, ClientInputs, jax.Array, jax.Array], ClientOutputs]:
    """Builds the pure function that trains every client of a round.

    Args:
        layout: where clients run.
        training: the local update.
        rule: which part of the adapter is trained and what is sent of it.
        codec: clipping and fixed point of the message.
        row_loss: `(base, adapter, row) -> loss in nats`.

    Returns:
        `(base, adapter, clients, seed, round) -> outputs`. It holds no key and no data.
    """

    def one_client(shared: PyTree, client: ClientInputs) -> ClientOutputs:
        base, adapter, seed, round_index = shared
        before = rule.trainable(adapter)

        def loss(trainable: PyTree, row: PyTree) -> jax.Array:
            return row_loss(base, rule.replace(adapter, trainable), row)

        after, optimizer, metrics = client_update(
            loss,
            training,
            before,
            client.optimizer,
            client.table,
            key_for(seed, Purpose.EXAMPLE_SAMPLING, round_index, client.place),
            key_for(seed, Purpose.LOCAL_NOISE, round_index, client.place),
        )
        message = codec.encode(rule.message(before, after), client.weight)

        def only_if(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)

        # Moments that are not finite would make every later message of the client zeros as well.
        sound = client.participates & jnp.isfinite(message.norm)
        return ClientOutputs(
            only_if(client.participates, message, jax.tree.map(jnp.zeros_like, message)),
            only_if(sound, optimizer, client.optimizer),
            only_if(client.participates, metrics, jax.tree.map(jnp.zeros_like, metrics)),
        )

    over_clients = layout.map_clients(one_client)

    def train(
        base: PyTree, adapter: Adapter, clients: ClientInputs, seed: jax.Array, round_: jax.Array
    ) -> ClientOutputs:
        return over_clients((base, adapter, seed, round_), clients)

    return train
