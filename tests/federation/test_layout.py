"""Clients in groups on devices: what adds up, what is left out, and what comes back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.federation.layout import CohortLayout

CLIENTS, WIDTH = 7, 5


def inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "ints": draw.integers(-(2**29), 2**29, (CLIENTS, WIDTH)).astype(np.int32),
        "works": np.array([True, False, False, True, False, True, True]),
    }


def doubled(shared: jax.Array, client: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return client["ints"][0] + shared, client["ints"] * 2


@pytest.mark.parametrize("group", [1, 2])
def test_a_client_is_traced_once_for_shapes_and_sums(group: int) -> None:
    traces = []

    def seen(shared: jax.Array, client: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        traces.append(1)
        return doubled(shared, client)

    layout = laid_out(group, 1)
    jax.jit(layout.sum_clients(seen, 1)).lower(
        jnp.int32(1), layout.shard(inputs()), layout.rows(np.zeros(layout.padded, np.int32))
    )
    assert len(traces) == 1


def laid_out(group: int, devices: int) -> CohortLayout:
    return CohortLayout.over(CLIENTS, group, jax.devices()[:devices])


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_sums_that_grow_are_those_of_all_integers(group: int, devices: int, parts: int) -> None:
    """Whatever the groups and devices; wrapping around is that of int32."""
    layout, host = laid_out(group, devices), inputs()
    part_K = np.arange(layout.padded, dtype=np.int32) % parts
    mapped = jax.jit(layout.sum_clients(doubled, parts))
    results, sums = mapped(jnp.int32(1), layout.shard(host), layout.rows(part_K))
    truth = np.zeros((parts, WIDTH), np.int32)
    with np.errstate(over="ignore"):
        for k in range(CLIENTS):
            truth[part_K[k]] += host["ints"][k] * np.int32(2)
    np.testing.assert_array_equal(sums, truth)
    np.testing.assert_array_equal(results[:CLIENTS], host["ints"][:, 0] + 1)


@pytest.mark.parametrize(("group", "busy_first"), [(1, False), (1, True), (2, True), (3, True)])
def test_groups_of_idle_clients_are_not_computed_and_add_nothing(
    group: int, busy_first: bool
) -> None:
    """Those that work stand together if asked to: as few groups as hold them."""
    layout, host = laid_out(group, 1), inputs()
    computed: list[int] = []

    def counted(shared: jax.Array, client: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda first: computed.append(int(first)), client["ints"][0])
        result, ints_P = doubled(shared, client)
        return result, jnp.where(client["works"], ints_P, 0)

    def idle(client: dict[str, jax.Array], shapes: Any) -> tuple[jax.Array, Any]:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return ~client["works"], nothing

    mapped = jax.jit(layout.sum_clients(counted, 1, idle, busy_first))
    part_K = layout.rows(np.zeros(layout.padded, np.int32))
    results, sums = jax.block_until_ready(mapped(jnp.int32(1), layout.shard(host), part_K))
    jax.effects_barrier()
    working = host["ints"][host["works"]]
    assert len(computed) == group * -(-len(working) // group)
    assert set(working[:, 0].tolist()) <= set(computed)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(sums[0], (working * np.int32(2)).sum(axis=0, dtype=np.int32))
    found = np.asarray(results)[: layout.clients]
    np.testing.assert_array_equal(found[host["works"]], working[:, 0] + 1)
    if group == 1:
        assert not found[~host["works"]].any()


@pytest.mark.parametrize(("group", "devices"), [(1, 1), (2, 1), (3, 2)])
def test_what_is_spread_comes_back(group: int, devices: int) -> None:
    layout = laid_out(group, devices)
    own = {"a": jnp.arange(CLIENTS * 2.0).reshape(CLIENTS, 2), "b": jnp.arange(CLIENTS)}
    there = layout.spread(own)
    assert all(leaf.shape[0] == layout.padded for leaf in jax.tree.leaves(there))
    back = layout.collect(there)
    for name in own:
        np.testing.assert_array_equal(back[name], own[name])


@pytest.mark.optimised
def test_memory_of_growing_sums_does_not_follow_the_clients() -> None:
    """The compiled program's scratch memory; messages of all clients would be 64 times as large."""

    def scratch(clients: int) -> int:
        layout = CohortLayout.over(clients, 1, jax.devices()[:1])

        def long(shared: jax.Array, client: jax.Array) -> tuple[jax.Array, jax.Array]:
            return client, jnp.full((10_000,), client, jnp.int32) * shared

        mapped = jax.jit(layout.sum_clients(long, 1))
        ones = jnp.ones(clients, jnp.int32)
        memory = mapped.lower(jnp.int32(2), ones, ones).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    assert scratch(256) <= 1.2 * scratch(4)
