"""Grouped-query attention, causal and within segments, as pure functions."""

import jax
import jax.numpy as jnp

# Finite, so that a row in which nothing may be seen gives a uniform average and never NaN.
_MASKED = -1e30


def attention_mask(
    length: int, segments_BxT: jax.Array | None, sliding_window: int | None
) -> jax.Array:
    """Which positions each position sees: bool [B, T, T], or [1, T, T] without segments.

    Causal and within the segment. Padding (segment 0) sees padding, itself at least, so that
    every row has something to average; what it computes is finite and counted nowhere.
    """
    query_Tx1 = jnp.arange(length, dtype=jnp.int32)[:, None]
    key_1xT = jnp.arange(length, dtype=jnp.int32)[None, :]
    mask_TxT = _visible(
        query_Tx1, key_1xT, sliding_window if _bites(sliding_window, length) else None
    )
    if segments_BxT is None:
        return mask_TxT[None]
    return mask_TxT[None] & (segments_BxT[:, :, None] == segments_BxT[:, None, :])


def cache_mask(start: jax.Array, queries: int, keys: int, sliding_window: int | None) -> jax.Array:
    """Which cache slots the queries at positions start, start + 1, ... see: bool [1, T, S]."""
    query_Tx1 = start + jnp.arange(queries, dtype=jnp.int32)[:, None]
    key_1xS = jnp.arange(keys, dtype=jnp.int32)[None, :]
    return _visible(query_Tx1, key_1xS, sliding_window)[None]


def _bites(sliding_window: int | None, length: int) -> bool:
    return sliding_window is not None and sliding_window < length


def _visible(query: jax.Array, key: jax.Array, sliding_window: int | None) -> jax.Array:
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible


def attend(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, mask_BxTxS: jax.Array
) -> jax.Array:
    """Softmax attention of H query heads over G key heads, H a multiple of G.

    Query heads h * H/G ... share key head h (Hugging Face's order). Scores and softmax are
    float32 whatever the inputs are.

    Returns:
      An array of the shape and dtype of ``q_BxTxHxK``.
    """
    batch, length, heads, width = q_BxTxHxK.shape
    groups = k_BxSxGxK.shape[2]
    q_BxTxGxMxK = q_BxTxHxK.reshape(batch, length, groups, heads // groups, width)
    scores_BxGxMxTxS = jnp.einsum(
        "btgmk,bsgk->bgmts", q_BxTxGxMxK, k_BxSxGxK, preferred_element_type=jnp.float32
    ) * jnp.float32(width**-0.5)
    scores_BxGxMxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxGxMxTxS, jnp.float32(_MASKED))
    weights_BxGxMxTxS = jax.nn.softmax(scores_BxGxMxTxS, axis=-1).astype(v_BxSxGxK.dtype)
    out_BxTxGxMxK = jnp.einsum("bgmts,bsgk->btgmk", weights_BxGxMxTxS, v_BxSxGxK)
    return out_BxTxGxMxK.reshape(batch, length, heads, width)
