"""What processes of a run tell each other, in two of them."""

import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm.federation import processes
from fedjax_llm.runs.processes import launching
from fedjax_llm.runs.processes.launch_places import Place


def test_alone_nothing_happens() -> None:
    tree = {"a": jnp.arange(3), "b": ()}
    assert processes.leads() and not processes.several()
    assert processes.from_first(tree) is tree
    assert processes.own(tree)["a"] is tree["a"]
    processes.check_same(b"1", "what")


SCRIPT = """
import sys
from fedjax_llm.runs.processes import distributed
world = distributed.join(patience=60.0)
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from fedjax_llm.errors import UserError
from fedjax_llm.federation import processes
from fedjax_llm.runs.job import orders

first = world.leads
assert processes.several() and processes.leads() == first
# Bits that a sum would lose: a zero's sign, what a NaN carries; and sizes that fill no word.
odd = np.array([0x80000000, 0x7FC12345, 0x7F800001, 1], np.uint32).view(np.float32)
tree = {"odd": odd, "flags": np.array([True, False, True]), "none": np.zeros((0, 3)),
        "long": np.arange(5, dtype=np.int64) - 2**62, "one": np.float32(0.1)}
held = tree if first else jax.tree.map(np.zeros_like, tree)
told = processes.from_first(held)
for name, leaf in tree.items():
    assert np.asarray(leaf).tobytes() == told[name].tobytes(), name
    assert np.shape(leaf) == told[name].shape and np.asarray(leaf).dtype == told[name].dtype

secret = bytes(range(32))
assert orders.shared_secret(secret if first else bytes(32)) == secret
orders.give(orders.Order.ROUND) if first else print(orders.take().name, file=sys.stderr)

mesh = jax.make_mesh((jax.device_count(),), ("clouds",), axis_types=(AxisType.Auto,))
there = jax.make_array_from_callback(
    (3,), NamedSharding(mesh, PartitionSpec()), lambda index: np.arange(3.0)[index])
own = processes.own({"x": there, "n": 3})
assert own["x"].is_fully_addressable and own["x"].tolist() == [0.0, 1.0, 2.0] and own["n"] == 3

# All settings; places of files may differ by process.
class File:
    def __init__(self, rounds):
        self.rounds = rounds

    def model_dump(self, mode):
        return {"rounds": self.rounds, "data": {"path": str(first)}}


orders.check_same({"data": "1"}, File(1))
for identity, rounds in (("1" if first else "2", 1), ("1", 1 if first else 2)):
    try:
        orders.check_same({"data": identity}, File(rounds))
    except UserError as error:
        print(error, file=sys.stderr)
    else:
        raise AssertionError("differs, and nobody said so")
"""


@pytest.mark.optimised
def test_the_first_process_is_heard_to_the_bit() -> None:
    said: list[str] = []
    ended = launching.launch(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], [Place()] * 2, echo=said.append
    )
    words = (
        "process 1 has another model, data, settings, JAX or XLA_FLAGS than the first; give all "
        "processes of a run the same files\n"
    )
    assert ended.code == 0, "".join(said)
    assert sorted(said) == sorted(["[process 1] ROUND\n", *[f"[process 1] {words}", words] * 2])
    assert jax.process_count() == 1
