"""Causal attention whose scores stay in the core: its two kernels, and where they can run.

`attention.softmax_attention` writes B x H x T x T scores to memory and reads them back several
times; at 1,024 positions and heads 64 wide they are 16 times as many as the queries. The kernels
(`attention_gpu`, `attention_tpu`) hold the scores of two blocks at a time, and leave out the blocks
that no query sees. They take what a position sees in words, not as a matrix.

Letters: B rows, T positions, H query heads, G heads of keys, K width of a head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .pallas_forms import by_platform

# A block of queries, of keys and of scores must fit a core's registers.
WIDEST = 256


def cannot(width: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why there is no kernel for heads of this width and dtype here, with the cure; None if one is.

    | case | kernel |
    |---|---|
    | float32 or bfloat16, heads up to 256 wide, any length, any window | yes |
    | another dtype, or wider heads | no |
    | a mesh with axes that the compiler divides by itself, which it cannot do with a kernel | no |
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = {a: n for a, n in mesh.shape.items() if n > 1 and a not in mesh.manual_axes}
    if divided:
        return f"a kernel cannot be divided by the compiler, got a mesh of {divided}; make it one"
    if jnp.dtype(dtype) not in (jnp.float32.dtype, jnp.bfloat16.dtype):
        return f"the kernel takes float32 or bfloat16, got {jnp.dtype(dtype)}; cast to one of them"
    if not 1 <= width <= WIDEST:
        return f"the kernel takes heads of 1 to {WIDEST} numbers, got {width}; use the XLA form"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segments_BxT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Computes ``softmax(q k^T / sqrt(K)) v`` over the keys that a query sees, by a kernel.

    A position sees those up to itself that are of its segment and, with a window, within it. Query
    heads h * H/G ... share key head h. Softmax and sums are float32 whatever the inputs are.
    Differentiable once, in reverse mode, in ``q``, ``k`` and ``v``; kept for it are the arguments,
    the result and one number for each query and head. Under ``jax.vmap`` the copies, as clients or
    examples, become more rows of the same kernel.

    | case | result |
    |---|---|
    | B or T is 0 | an empty array |
    | padding, of segment 0 | sees padding, itself at least: finite |
    | a value of one row is not finite | no other row is affected |

    Args:
      q_BxTxHxK: Queries, float32 or bfloat16.
      k_BxTxGxK: Keys, of the same dtype; H is a multiple of G.
      v_BxTxGxK: Values, of the same dtype.
      segments_BxT: int32; which sequence of the row a position belongs to.
      window: Positions that a query sees, itself among them; None for all.

    Returns:
      An array of the shape and dtype of ``q_BxTxHxK``.

    Raises:
      ValueError: There is no kernel for these arrays here, see `cannot`; heads that do not divide;
        a window below 1.
    """
    return _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segments_BxT, window)[0]


def _forward(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segments_BxT: jax.Array,
    window: int | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    reason = cannot(q_BxTxHxK.shape[-1], q_BxTxHxK.dtype)
    if reason is not None:
        raise ValueError(reason)
    heads, groups = q_BxTxHxK.shape[2], k_BxTxGxK.shape[2]
    if heads % groups:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {heads} and {groups}; give each key "
            "head as many queries"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}; a position sees itself")
    arguments = q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segments_BxT
    if 0 in q_BxTxHxK.shape:
        out_BxTxHxK, lse_BxHxT = q_BxTxHxK, jnp.zeros(())
    else:
        out_BxTxHxK, lse_BxHxT = _values(window, *arguments)
    return out_BxTxHxK, (*arguments, out_BxTxHxK, lse_BxHxT)


def _backward(
    window: int | None, saved: tuple[jax.Array, ...], dout_BxTxHxK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    if 0 in dout_BxTxHxK.shape:
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, *_ = saved
        return jnp.zeros_like(q_BxTxHxK), jnp.zeros_like(k_BxTxGxK), jnp.zeros_like(v_BxTxGxK), None
    dq_BxTxHxK, dk_BxTxGxK, dv_BxTxGxK = _cotangents(window, *saved, dout_BxTxHxK)
    return dq_BxTxHxK, dk_BxTxGxK, dv_BxTxGxK, None


causal_attention.defvjp(_forward, _backward)


def _values(window: int | None, *arrays: jax.Array) -> Any:
    from .attention_gpu import gpu_forward
    from .attention_tpu import tpu_forward

    return by_platform(
        partial(tpu_forward, window=window), partial(gpu_forward, window=window), *arrays
    )


def _cotangents(window: int | None, *arrays: jax.Array) -> Any:
    from .attention_gpu import gpu_backward
    from .attention_tpu import tpu_backward

    return by_platform(
        partial(tpu_backward, window=window), partial(gpu_backward, window=window), *arrays
    )
