"""Rows in the host's memory: the same bytes, no transfer unasked, and where they go by themselves.

On a CPU the two memories are one, so that what is claimed of a device's bytes and of the order of
copies is tested on what the compiler of a TPU makes of a round: `test_rows_for_tpu.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.federation import Federation, Masked, Plain
from fedjax_llm.federation.engine import Engine
from fedjax_llm.federation.host_rows import packed, unpacked
from fedjax_llm.federation.layout import CohortLayout, Memory, check_host_memory
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.federation.tables import client_tables, table_shapes
from fedjax_llm.training import ExamplePrivacy, LocalTraining

Build = Callable[..., Federation]
CLIENTS, ROWS = 7, 5


def trained(federation: Federation) -> Any:
    """The state after two rounds, of which the second is fed nothing that is not put there."""
    state, first = federation.run_round(federation.init(), donate=True)
    # The host draws who is sampled, and takes hidden sums, with arrays of its own.
    free = federation.plan.unit == "client" or not isinstance(federation.sum_mode, Plain)
    with jax.transfer_guard_host_to_device("allow" if free else "disallow"):
        state, second = federation.run_round(state, donate=True)
    assert first.update_norm > 0
    assert second.update_norm > 0
    return jax.device_get(state)


def kinds(federation: Federation) -> set[str]:
    table = federation.roster._tables
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(table.rows)}


@pytest.mark.parametrize("busy_first", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_each_client_meets_its_own_rows(group: int, devices: int, busy_first: bool) -> None:
    """Whatever the groups and the order: each adds its own rows to the sum, and returns them."""
    layout = CohortLayout.over(CLIENTS, group, jax.devices()[:devices])
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2**20, (CLIENTS, ROWS)).astype(np.int32)
    works = np.array([False, True, False, False, True, False, True])

    def one(shared: jax.Array, client: Any) -> tuple[jax.Array, jax.Array]:
        return client[0] + shared, jnp.where(client[1], client[0] * shared, 0)

    def idle(client: Any, shapes: Any) -> tuple[jax.Array, Any]:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return ~client[1], nothing

    mapped = jax.jit(layout.sum_clients(one, 1, idle, busy_first))
    clients = (layout.shard(rows, "host"), layout.shard(works))
    part_K = layout.rows(np.zeros(layout.padded, np.int32))
    results, sums = mapped(jnp.int32(3), clients, part_K)
    assert results.sharding.memory_kind == sums.sharding.memory_kind == "device"
    np.testing.assert_array_equal(sums[0], 3 * rows[works].sum(axis=0))
    np.testing.assert_array_equal(np.asarray(results)[:CLIENTS][works], rows[works] + 3)


@pytest.mark.parametrize(
    ("unit", "devices", "changes"),
    [
        ("none", 1, {"clients_at_once": 2}),
        # As users compile them.
        pytest.param("example", 2, {}, marks=pytest.mark.drill),
        pytest.param("client", 1, {"clients_at_once": 2, "rate": 0.5}, marks=pytest.mark.drill),
        pytest.param("none", 2, {"sum_mode": Masked()}, marks=pytest.mark.drill),
    ],
)
def test_rows_on_the_host_move_no_bit(
    federate: Build, unit: str, devices: int, changes: dict[str, Any]
) -> None:
    """Groups of one and two, on one device and two; clients sampled, who change places."""

    def found(rows: Memory) -> Any:
        federation = federate(unit, devices=jax.devices()[:devices], rows=rows, **changes)
        state = trained(federation)
        assert kinds(federation) == {"pinned_host" if rows == "host" else "device"}
        return state

    jax.tree.map(np.testing.assert_array_equal, found("host"), found("device"))


@pytest.mark.drill
@pytest.mark.parametrize("mesh", [MeshShape(1, 1, 2), MeshShape(1, 2, 1)])
def test_devices_that_share_weights_or_a_client_fetch_its_rows(
    federate: Build, mesh: MeshShape
) -> None:
    """Along `model` the compiler divides what is not spread by hand, the copies included."""

    def found(rows: Memory) -> Any:
        return trained(federate(devices=jax.devices()[:2], mesh=mesh, rows=rows))

    jax.tree.map(np.testing.assert_array_equal, found("host"), found("device"))


def test_shapes_of_tables_are_those_of_the_tables(make_participants: Any) -> None:
    clouds = make_participants()
    for privacy in (None, ExamplePrivacy(0.5, 0.8, period=3)):
        training = LocalTraining(None, 2, 4, 4, privacy)  # type: ignore[arg-type]
        made = jax.eval_shape(lambda: client_tables(clouds, training))  # noqa: B023
        said = table_shapes(clouds, training)
        assert jax.tree.structure(made) == jax.tree.structure(said)
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(said), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_rows_come_back_from_the_host_as_they_were(make_participants: Any) -> None:
    for cloud in make_participants():
        there = packed(cloud.train)
        assert there.dtype == np.int32
        back = unpacked(jnp.asarray(there))
        for one, other in zip(back, cloud.train, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        said = packed(jax.eval_shape(lambda rows: rows, cloud.train))
        assert (said.shape, said.dtype) == (there.shape, there.dtype)


def test_rows_stay_on_the_host_where_they_do_not_fit(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerators say it: a program takes 100 bytes a client, and the rows, if they are there.

    On the host's account is what the compiled program of a device leaves out.
    """

    def bytes_of(self: Engine, state: Any, plain: bool) -> int:
        return 100 * self.layout.group + (1000 if self.roster.rows == "device" else 0)

    monkeypatch.setattr(Engine, "bytes", bytes_of)
    federation = federate(devices=jax.devices()[:1], rows="auto")
    engine, state = federation._engine, federation.init()

    def fitted(memory: int, **settings: Any) -> tuple[Memory, int]:
        found = engine.fitted(state, memory, True, **settings)
        return found.roster.rows, found.layout.group

    assert fitted(1300, rows_may_move=True) == ("device", 1)
    assert fitted(1200, rows_may_move=True) == ("host", 3)
    assert fitted(250, rows_may_move=True) == ("host", 2)
    # As many at once as were asked for, wherever their rows are.
    assert fitted(1300, rows_may_move=True, group=1) == ("device", 1)
    assert fitted(1200, rows_may_move=True, group=1) == ("host", 1)
    with pytest.raises(UserError, match="one client takes"):
        fitted(1200)


def test_devices_without_the_host_s_memory_are_refused() -> None:
    class Device:
        device_kind = "abacus"

        def addressable_memories(self) -> list[Any]:
            return []

    with pytest.raises(UserError, match=r"'abacus' cannot fetch .* set rows = .device"):
        check_host_memory([Device()])  # type: ignore[list-item]
    check_host_memory(jax.devices())
