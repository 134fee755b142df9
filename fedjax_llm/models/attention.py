"""Grouped-query attention, causal and within segments, as pure functions."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_llm_kernels import attention_fused, choice
from fedjax_llm_kernels.attention import softmax_attention
from fedjax_llm_kernels.pallas_forms import Implementation


@dataclasses.dataclass(frozen=True)
class Causal:
    """What each position of a row sees, in words: itself and those before it, of its segment.

    Attributes:
      segments_BxT: int32; padding is segment 0 and sees padding.
      sliding_window: positions seen, itself among them; None for all.
    """

    segments_BxT: jax.Array
    sliding_window: int | None


type Sight = jax.Array | Causal
"""What each position sees: a mask, bool [B or 1, T, S], or the same in words, for a kernel."""


def causal_sight(
    shape: tuple[int, int],
    segments_BxT: jax.Array | None,
    sliding_window: int | None,
    *,
    width: int,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> Sight:
    """What each position of B rows of T sees, in the form that `attend` is fastest with.

    In words where the table of `choice` names the kernel for the device kind and there is one
    (`attention_fused.cannot` says where not); else as a mask, by `attention_mask`.

    Args:
      shape: B and T.
      segments_BxT: int32, or None when each row is one sequence without padding.
      sliding_window: Positions seen, or None for all.
      width: Of a head.
      dtype: Of queries, keys and values.
      implementation: "xla", "pallas", or None for what the table names.

    Raises:
      ValueError: "pallas" is asked for by name where there is none, or it is no form.
    """
    rows, length = shape
    if choice.of("attention", implementation) == "pallas":
        reason = attention_fused.cannot(width, dtype)
        if reason is None:
            if segments_BxT is None:
                segments_BxT = jnp.ones((rows, length), jnp.int32)
            return Causal(segments_BxT, sliding_window if _bites(sliding_window, length) else None)
        if implementation is not None:
            # Who measures forms is not to be given another one.
            raise ValueError(reason)
    return attention_mask(length, segments_BxT, sliding_window)


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
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, sight: Sight
) -> jax.Array:
    """Softmax attention of H query heads over G key heads, H a multiple of G.

    Query heads h * H/G ... share key head h (Hugging Face's order). Scores and softmax are
    float32 whatever the inputs are. A mask has them written to memory; words have a kernel.

    Returns:
      An array of the shape and dtype of ``q_BxTxHxK``.
    """
    if isinstance(sight, Causal):
        return attention_fused.causal_attention(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, sight.segments_BxT, sight.sliding_window
        )
    batch, length, heads, width = q_BxTxHxK.shape
    groups = k_BxSxGxK.shape[2]
    shared = heads // groups
    q_BxTxGxMxK = q_BxTxHxK.reshape(batch, length, groups, shared, width)
    # The queries that share a head of keys stand one after the other: M blocks of T.
    q_BxGxNxK = q_BxTxGxMxK.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)
    out_BxGxNxK = softmax_attention(
        q_BxGxNxK,
        k_BxSxGxK.swapaxes(1, 2),
        v_BxSxGxK.swapaxes(1, 2),
        jnp.tile(sight, (1, shared, 1)),
    )
    out_BxGxMxTxK = out_BxGxNxK.reshape(batch, groups, shared, length, width)
    return out_BxGxMxTxK.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
