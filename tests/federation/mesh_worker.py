"""A process of a federation, for tests: trains two rounds on a mesh and prints what came out.

    python mesh_worker.py FOLDER UNIT SUM MESH...

A mesh is `clouds,data,model`. The first process writes the state of each as FOLDER/MESH.npy. How
many processes and devices there are, the environment says.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fedjax_llm.runs.processes import distributed

world = distributed.join(patience=120.0)

import jax  # noqa: E402
import numpy as np  # noqa: E402

from fedjax_llm.federation import Plain, Threshold  # noqa: E402
from fedjax_llm.federation.mesh import MeshShape  # noqa: E402


def small_federation() -> ModuleType:
    """The conftest of this folder, which a process outside of pytest cannot ask for fixtures."""
    spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def main(folder: str, unit: str, sum_mode: str, *meshes: str) -> None:
    small = small_federation()
    modes = {"plain": Plain(), "threshold": Threshold(2, 2)}
    for mesh in meshes:
        federation = small.build(
            small.random_model(),
            unit,
            mesh=MeshShape(*map(int, mesh.split(","))),
            sum_mode=modes[sum_mode],
        )
        state = federation.init()
        for after, _ in federation.rounds(state, 2):
            state = after
        losses = federation.evaluate(state)
        if world.leads:
            flat = [np.ravel(jax.device_get(leaf)) for leaf in jax.tree.leaves(state)]
            losses_C = np.array([losses[name] for name in sorted(losses)])
            np.save(Path(folder) / f"{mesh}.npy", np.concatenate([*flat, losses_C]))


if __name__ == "__main__":
    main(*sys.argv[1:])
