"""Training rows as they lie in a host's memory: each one stretch of int32.

Devices copy from there while they compute. One array, so that a group's rows are one copy: of
several, the compiler of a GPU has two under way and lets the others come before. Of 32 bits,
because a TPU copies an array of bytes as a whole and lays it out anew before it takes a part of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import Batch

_PARTS = len(Batch._fields)


def packed(rows: Batch) -> Any:
    """Rows with leaves [..., T] as one array int32 [..., 3 T]; or of their shapes the shape."""
    leaves = jax.tree.leaves(rows)
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        *rest, length = leaves[0].shape
        return jax.ShapeDtypeStruct((*rest, _PARTS * length), jnp.int32)
    return np.concatenate([np.asarray(leaf, np.int32) for leaf in leaves], axis=-1)


def unpacked(rows: jax.Array) -> Batch:
    """The inverse of `packed`, on a device and inside its program."""
    tokens, loss_mask, segments = jnp.split(rows, _PARTS, axis=-1)
    return Batch(tokens, loss_mask != 0, segments)
