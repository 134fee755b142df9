"""Loops that two devices take together: each as by itself, with parts put together inside."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from fedjax_llm_kernels.lockstep import DATA, in_step, turns_together


def on_two(function: Callable[..., Any], axis: str = DATA) -> Callable[..., Any]:
    """A function of one device's row, on two devices with a row each."""
    mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def on_device(*rows: jax.Array) -> Any:
        found = function(*(row[0] for row in rows))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found)

    spread = PartitionSpec(axis)
    return jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    )


@pytest.mark.optimised
@pytest.mark.parametrize("turns", [(0, 3), (4, 1), (2, 2), (0, 0)])
def test_a_loop_ends_for_each_as_it_would_alone(turns: tuple[int, int]) -> None:
    weights_2xD = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)

    def body(whole_D: Callable[[], jax.Array]) -> Callable[..., Any]:
        # NaN in a turn too many would show, as would the sign of a zero.
        return lambda index, carry: (
            carry[0] * jnp.sum(whole_D()) / (3 - index.astype(jnp.float32)),
            carry[1] + 1,
        )

    start = (jnp.float32(-0.0), jnp.int32(7)), (jnp.float32(0.1), jnp.int32(8))

    def together(turns: jax.Array, first: jax.Array, second: jax.Array, part: jax.Array) -> Any:
        whole = body(lambda: jax.lax.all_gather(part, DATA, tiled=True))
        return turns_together(turns, whole, (first, second))

    rows = (
        np.array(turns, np.int32),
        np.array([-0.0, 0.1], np.float32),
        np.array([7, 8], np.int32),
    )
    found = on_two(together)(*rows, weights_2xD)
    whole_D = jnp.asarray(weights_2xD.reshape(-1))
    for device in range(2):
        alone = jax.lax.fori_loop(
            jnp.int32(0), jnp.int32(turns[device]), body(lambda: whole_D), start[device]
        )
        for own, wanted in zip(found, alone, strict=True):
            assert np.asarray(own)[device].tobytes() == np.asarray(wanted).tobytes()


def test_only_devices_that_share_weights_wait_for_each_other() -> None:
    turns_2 = np.array([2, 5], np.int32)
    assert on_two(in_step)(turns_2).tolist() == [5, 5]
    assert on_two(in_step, "clouds")(turns_2).tolist() == [2, 5]
    turns = jnp.int32(3)
    assert in_step(turns) is turns
