"""Attention on a TPU, by JAX's own kernel, whose scores stay in fast memory ("splash attention").

It knows heads that share keys, windows and segments, and it visits no block that nobody sees. What
it keeps for its derivative is not for others to have, so that `tpu_backward` runs it forward again:
two products of seven.

Letters: B rows, T positions, H query heads, G heads of keys, K width of a head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from .pallas_forms import LANES, power_of_two_at_most, whole_blocks

# Positions of the largest block: two of them and their scores in float32 are 3 MiB at width 256.
_MOST = 512


def tpu_forward(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segments_BxT: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The mix [B, T, H, K], and zeros [B, H, T] where the form for GPUs has what it keeps."""
    rows, length, heads, _ = q_BxTxHxK.shape
    mix = _mix(segments_BxT, window, interpret)(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)
    return mix, jnp.zeros((rows, heads, length), jnp.float32)


def tpu_backward(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segments_BxT: jax.Array,
    out_BxTxHxK: jax.Array,
    lse_BxHxT: jax.Array,
    dout_BxTxHxK: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v, each of its shape and dtype."""
    del out_BxTxHxK, lse_BxHxT
    mix = _mix(segments_BxT, window, interpret)
    found: tuple[jax.Array, jax.Array, jax.Array] = jax.vjp(mix, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)[
        1
    ](dout_BxTxHxK)
    return found


def _mix(
    segments_BxT: jax.Array, window: int | None, interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    length = segments_BxT.shape[1]
    whole = whole_blocks(length, LANES) * LANES

    def padded(array_BxTx: jax.Array) -> jax.Array:
        # After all positions, so that none of these sees it.
        rest = [(0, 0)] * (array_BxTx.ndim - 2)
        return jnp.pad(array_BxTx, [(0, 0), (0, whole - length), *rest])

    def mix(q_BxTxHxK: jax.Array, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array) -> jax.Array:
        heads, width = q_BxTxHxK.shape[2:]
        kernel = _kernel(whole, heads, window, interpret)
        q_BxTxHxK = (q_BxTxHxK.astype(jnp.float32) * width**-0.5).astype(q_BxTxHxK.dtype)
        q, k, v = (padded(one).swapaxes(1, 2) for one in (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK))
        out_BxHxTxK = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
        return out_BxHxTxK.swapaxes(1, 2)[:, :length].astype(q_BxTxHxK.dtype)

    segments = padded(segments_BxT)
    return mix


def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Any:
    square = (length, length)
    seen = (
        splash.CausalMask(square)
        if window is None
        else splash.LocalMask(square, window_size=(window - 1, 0), offset=0)
    )
    # The largest block that divides the length.
    block = power_of_two_at_most(length & -length, LANES, _MOST)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
