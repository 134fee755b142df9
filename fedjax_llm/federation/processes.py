"""What the processes of one run tell each other beside the programs that they run together.

All of them call the same functions in the same order; with one process nothing happens. What only
one of them may do, such as drawing the keys of an encrypted sum, the first one does and tells.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedjax_llm.errors import UserError

PyTree = Any
_WORD = 4


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process is the one that keeps the run folder and opens encrypted sums."""
    return jax.process_index() == 0


def own(tree: PyTree) -> PyTree:
    """Arrays that are the same on every device, as arrays of this process alone.

    What one process computes by itself must not touch the devices of others.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        assert leaf.is_fully_replicated
        return leaf.addressable_data(0)

    return jax.tree.map(one, tree)


def from_first(tree: PyTree) -> PyTree:
    """The first process's arrays, bit for bit, in all processes.

    Args:
      tree: pytree of arrays that this process holds as a whole; in the others only structure,
        shapes and dtypes count.

    Returns:
      NumPy arrays of the same shapes and dtypes; `tree` itself where there is one process.
    """
    if not several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    held = [np.asarray(jax.device_get(leaf)) for leaf in leaves]
    # The broadcast is a sum with zeros, in which floats would lose the sign of their own zeros.
    raw = b"".join(leaf.tobytes() for leaf in held) if leads() else b""
    size = sum(leaf.nbytes for leaf in held)
    words = np.zeros(-(-size // _WORD), np.uint32)
    words.view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes()
    found, start = [], 0
    for leaf in held:
        own = np.frombuffer(told, leaf.dtype, leaf.size, start).reshape(leaf.shape).copy()
        found.append(own)
        start += leaf.nbytes
    return jax.tree.unflatten(structure, found)


def check_same(digest: bytes, what: str) -> None:
    """Refuses to go on where processes do not hold the same.

    Args:
      digest: of what has to be the same, of one length everywhere.
      what: that is, for the error.

    Raises:
      UserError: in every process, naming those that differ from the first.
    """
    if not several():
        return
    all_NxB = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differ = [str(k) for k, own in enumerate(all_NxB) if not np.array_equal(own, all_NxB[0])]
    if differ:
        raise UserError(
            f"process {', '.join(differ)} has another {what} than the first; give all processes of "
            "a run the same files"
        )
