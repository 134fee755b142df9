"""What a client minimises: the loss of one row."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.lora import Adapter
from fedjax_llm.models import Batch, Model, loss

PyTree = Any


def row_loss(
    model: Model,
    base: PyTree,
    adapter: Adapter,
    row: Batch,
    dtype: jax.typing.DTypeLike,
    remat: bool,
    unroll: int = 1,
) -> jax.Array:
    """Mean loss of one row in nats per answer token; 0 for a row without answer tokens.

    Args:
        model: for its configuration alone; the weights are an argument of their own, so that they
            are not baked into a compiled program.
        base: the frozen weights.
        adapter: what is trained.
        row: [T] leaves.
        dtype: of activations.
        remat: whether activations are recomputed in the backward pass instead of kept.
        unroll: layers that are compiled in a row.
    """
    batch = jax.tree.map(lambda leaf_T: leaf_T[None], row)
    nll_1, tokens_1 = loss(
        model.config, base, adapter, batch, dtype=dtype, remat=remat, unroll=unroll
    )
    return nll_1[0] / jnp.maximum(tokens_1[0], 1).astype(jnp.float32)
