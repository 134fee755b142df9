"""A federation over meshes and processes: the same bytes, shapes of shards, meshes that do not fit.

Along `clouds` and `data` a device computes whole clients with weights that are whole when they are
used, in programs of the same shapes: nothing can differ. Along `model` the sum over a matrix
product's inputs is the sum of what several devices have summed: rounded in another order, and each
local step starts from what the one before left.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from fedjax_llm.errors import UserError
from fedjax_llm.federation import CohortLayout, Federation
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.models import Model
from fedjax_llm.models.spread import Spread
from fedjax_llm.runs.processes import launching
from fedjax_llm.runs.processes.launch_places import Place

WORKER = Path(__file__).with_name("mesh_worker.py")


@pytest.mark.parametrize(
    ("shape", "devices", "words"),
    [
        (MeshShape(data=3), 2, "data x model = 3 x 1 does not divide the 2 devices of this run"),
        (MeshShape(model=4), 2, "data x model = 1 x 4 does not divide the 2 devices of this run"),
        (MeshShape(clouds=1), 2, r"mesh = 1 x 1 x 1 takes 1 devices and this run has 2"),
        (MeshShape(4, 1, 1), 2, r"mesh = 4 x 1 x 1 takes 4 devices and this run has 2"),
    ],
)
def test_a_mesh_that_the_devices_do_not_fill_is_refused(
    shape: MeshShape, devices: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        shape.over(jax.devices()[:devices])


def test_weights_that_the_mesh_does_not_divide_are_refused(model: Model) -> None:
    # Four heads, two key-value heads, 32 wide: refused before anything is put on a device.
    axes, types = ("clouds", "data", "model"), (AxisType.Auto,) * 3
    layout = CohortLayout(AbstractMesh((1, 1, 4), axes, axis_types=types), 3, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model = 4 does not divide the model's 2 key-value heads"):
        layout.place_base(model.config, model.base)


@pytest.mark.parametrize(
    ("shape", "query", "embed", "norm"),
    [
        (MeshShape(2, 1, 1), (3, 32, 32), (96, 32), (32,)),
        (MeshShape(1, 2, 1), (3, 16, 32), (48, 32), (32,)),
        (MeshShape(1, 1, 2), (3, 32, 16), (96, 16), (32,)),
    ],
)
def test_shapes_of_shards(
    model: Model,
    shape: MeshShape,
    query: tuple[int, ...],
    embed: tuple[int, ...],
    norm: tuple[int, ...],
) -> None:
    layout = CohortLayout.over(5, 1, jax.devices()[:2], shape)
    base = layout.place_base(model.config, model.base)
    found = (base["layers"]["q_proj"]["kernel"], base["embed"], base["norm"]["weight"])
    for leaf, part in zip(found, (query, embed, norm), strict=True):
        assert isinstance(leaf, Spread) == (shape.data > 1 and len(part) > 1)
        array = leaf.parts if isinstance(leaf, Spread) else leaf
        assert [shard.data.shape for shard in array.addressable_shards] == [part, part]
    # Five clients: three on one device, two and one that is no client on the other; or all on both.
    rows = layout.shard(np.arange(5, dtype=np.int32))
    own = 5 if shape.model > 1 else 3
    assert [shard.data.shape for shard in rows.addressable_shards] == [(own,), (own,)]


@pytest.mark.optimised
def test_weights_that_are_cut_give_the_same_bytes(federate: Callable[..., Federation]) -> None:
    """With Poisson samples, by which clients take different numbers of turns in every step."""
    whole = _trained(federate("example", devices=jax.devices()[:1]))
    cut = _trained(federate("example", devices=jax.devices()[:2], mesh=MeshShape(1, 2, 1)))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)


def _trained(federation: Federation) -> Any:
    state = federation.init()
    for after, _ in federation.rounds(state, 2):
        state = after
    return jax.device_get(state), federation.evaluate(state)


# By unit and sum: for each number of devices and processes, the meshes.
RUNS: dict[tuple[str, str], dict[tuple[int, int], list[str]]] = {
    ("none", "threshold"): {
        (2, 1): ["2,1,1", "1,1,2"],
        (8, 1): ["8,1,1"],
        (2, 2): ["2,1,1"],
    },
    ("example", "plain"): {
        (2, 1): ["1,2,1"],
        (8, 1): ["2,4,1", "2,2,2"],
        # One copy of the weights across both processes; a client across both.
        (4, 2): ["1,4,1", "2,1,2"],
    },
}


@pytest.mark.drill
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("unit", "sum_mode"), RUNS)
def test_devices_and_processes_move_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, sum_mode: str
) -> None:
    def found(devices: int, processes: int, meshes: list[str]) -> list[np.ndarray]:
        folder, said = tmp_path / f"{devices} {processes}", list[str]()
        folder.mkdir()
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices // processes))
        ended = launching.launch(
            [sys.executable, str(WORKER), str(folder), unit, sum_mode, *meshes],
            [Place()] * processes,
            echo=said.append,
        )
        assert ended.code == 0, "".join(said)
        return [np.load(folder / f"{mesh}.npy") for mesh in meshes]

    (one,) = found(1, 1, ["1,1,1"])
    assert np.isfinite(one).all() and np.ptp(one) > 0
    for (devices, processes), meshes in RUNS[unit, sum_mode].items():
        for mesh, other in zip(meshes, found(devices, processes, meshes), strict=True):
            where = f"mesh {mesh} in {processes} processes"
            if mesh.endswith(",1"):
                np.testing.assert_array_equal(other, one, err_msg=where)
            else:
                np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5, err_msg=where)
