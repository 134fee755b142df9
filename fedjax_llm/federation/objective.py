"""What a client minimises: the loss of its rows."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.federation.host_rows import unpacked
from fedjax_llm.lora import Adapter
from fedjax_llm.models import Batch, Model, loss

PyTree = Any


def rows_loss(
    model: Model,
    base: PyTree,
    adapter: Adapter,
    rows: Batch | jax.Array,
    dtype: jax.typing.DTypeLike,
    remat: bool,
    unroll: int = 1,
) -> jax.Array:
    """Mean loss of each row in nats per answer token, [B]; 0 for a row without answer tokens.

    Args:
        model: for its configuration alone; the weights are an argument of their own, so that they
            are not baked into a compiled program.
        base: the frozen weights.
        adapter: what is trained.
        rows: [B, T] leaves; or as they lie in a host's memory, see `host_rows`.
        dtype: of activations.
        remat: whether activations are recomputed in the backward pass instead of kept.
        unroll: layers that are compiled in a row.
    """
    batch = rows if isinstance(rows, Batch) else unpacked(rows)
    nll_B, tokens_B = loss(
        model.config, base, adapter, batch, dtype=dtype, remat=remat, unroll=unroll
    )
    return nll_B / jnp.maximum(tokens_B, 1).astype(jnp.float32)


def row_loss(
    model: Model,
    base: PyTree,
    adapter: Adapter,
    row: Batch,
    dtype: jax.typing.DTypeLike,
    remat: bool,
    unroll: int = 1,
) -> jax.Array:
    """`rows_loss` of one row, [T] leaves: a scalar, as gradients of single examples need it."""
    rows = jax.tree.map(lambda leaf_T: leaf_T[None], row)
    return rows_loss(model, base, adapter, rows, dtype, remat, unroll)[0]
