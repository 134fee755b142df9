"""Attention on a GPU: scores of two blocks of positions, in registers, and nowhere else.

FlashAttention-2 (arXiv 2307.08691) in Pallas, forward in one kernel and backward in two: one walks
the queries for each block of keys, one the keys for each block of queries. Blocks that no query of
a block sees, later ones and ones before its window, are not visited.

JAX's own kernels do not serve here. `pallas.ops.gpu.attention` warns when imported that it is
deprecated, and has neither a window nor keys that heads share. cuDNN's, by
`jax.nn.dot_product_attention`, wants a bias [B, 1, T, T] for several sequences in a row, takes no
float32, and where the library is missing it cannot even be traced for another platform.

Letters: B rows, T positions, H query heads, G heads of keys, M = H / G of which share one, K width.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .attention import MASKED
from .pallas_forms import power_of_two_at_most, whole_blocks

# Tensor cores multiply 16 x 16 at least.
_LEAST = 16
# Positions of a block of keys at most, and bytes of it.
_MOST, _BLOCK_BYTES = 64, 16 << 10


class _Sizes(NamedTuple):
    """What the kernels must know while they are traced.

    Attributes:
      block: positions of a block of keys and, backward, of queries.
      queries: positions of a block of queries, forward; a multiple of `block`.
      window: positions that a query sees, itself among them; None for all before it.
      scale: of the scores, 1 / sqrt(K).
    """

    block: int
    queries: int
    window: int | None
    scale: float

    @classmethod
    def of(cls, q_BxTxHxK: jax.Array, window: int | None) -> "_Sizes":
        _, length, _, width = q_BxTxHxK.shape
        # As much as a thread can hold in registers, by what the compiler for an H100 says.
        most = power_of_two_at_most(_BLOCK_BYTES / _head_bytes(q_BxTxHxK), _LEAST, _MOST)
        block = power_of_two_at_most(pl.next_power_of_2(length), _LEAST, most)
        return cls(block, block * (2 if length > block else 1), window, width**-0.5)

    def first_key(self, start: jax.Array) -> jax.Array | int:
        """The block of the first key that the query at `start` sees."""
        if self.window is None:
            return 0
        return jax.lax.div(jnp.maximum(start - (self.window - 1), 0), self.block)

    def end_of_queries(self, start: jax.Array, blocks: int) -> jax.Array | int:
        """Behind the last block of queries that see a key of the block at `start`."""
        if self.window is None:
            return blocks
        last = start + (self.block - 1) + (self.window - 1)
        return jnp.minimum(jax.lax.div(last, self.block) + 1, blocks)

    def masked(
        self, scores_QxS: jax.Array, query: tuple[jax.Array, Any], key: tuple[jax.Array, Any]
    ) -> jax.Array:
        """Scores in powers of two; where a query does not see the key, as good as none.

        Args:
          scores_QxS: Products of queries and keys.
          query: Position of the first one, and the segments of all.
          key: The same.
        """
        (first_query, of_query_Q), (first_key, of_key_S) = query, key
        query_Qx1 = first_query + jnp.arange(scores_QxS.shape[0], dtype=jnp.int32)[:, None]
        key_1xS = first_key + jnp.arange(scores_QxS.shape[1], dtype=jnp.int32)[None, :]
        sees = (key_1xS <= query_Qx1) & (of_query_Q[:, None] == of_key_S[None, :])
        if self.window is not None:
            sees &= key_1xS > query_Qx1 - self.window
        return jnp.where(sees, scores_QxS * (self.scale * math.log2(math.e)), MASKED)


def gpu_forward(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segments_BxT: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The mix, [B, T, H, K], and the logarithm to base 2 of each query's sum, float32 [B, H, T]."""
    rows, length, heads, width = q_BxTxHxK.shape
    shared = heads // k_BxTxGxK.shape[2]
    sizes = _Sizes.of(q_BxTxHxK, window)
    q, k, v, segments = _whole(sizes, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segments_BxT)
    whole, wide = q.shape[1], q.shape[3]
    one = pl.BlockSpec((None, sizes.queries, None, wide), lambda i, h, b: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, whole, None, wide), lambda i, h, b: (b, 0, h // shared, 0))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, sizes),
        grid=(whole // sizes.queries, heads, rows),
        in_specs=[one, all_keys, all_keys, _row(whole)],
        out_specs=[one, pl.BlockSpec((None, None, sizes.queries), lambda i, h, b: (b, h, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, whole), jnp.float32),
        ],
        compiler_params=_parameters(q),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, segments)
    return out[:, :length, :, :width], lse[:, :, :length]


def _forward_kernel(
    sizes: _Sizes, q_ref: Any, k_ref: Any, v_ref: Any, segments: Any, out_ref: Any, lse_ref: Any
) -> None:
    start = pl.program_id(0) * sizes.queries
    q_QxK = q_ref[...]
    query = start, segments[pl.ds(start, sizes.queries)]

    def absorb(
        turn: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mix_QxK, max_Q, sum_Q = carry
        first = turn * sizes.block
        at = pl.ds(first, sizes.block)
        v_SxK = v_ref[at, :]
        scores_QxS = sizes.masked(_dot(q_QxK, k_ref[at, :], 1, 1), query, (first, segments[at]))
        new_max_Q = jnp.maximum(max_Q, jnp.max(scores_QxS, axis=1))
        # What was added before a query's first visible key came is forgotten with it.
        shrink_Q = jnp.exp2(max_Q - new_max_Q)
        weights_QxS = jnp.exp2(scores_QxS - new_max_Q[:, None])
        added_QxK = _dot(weights_QxS.astype(v_SxK.dtype), v_SxK, 1, 0)
        return (
            mix_QxK * shrink_Q[:, None] + added_QxK,
            new_max_Q,
            sum_Q * shrink_Q + jnp.sum(weights_QxS, axis=1),
        )

    empty_Q = jnp.zeros(sizes.queries, jnp.float32)
    carry = jnp.zeros(q_QxK.shape, jnp.float32), empty_Q + MASKED, empty_Q
    end = jax.lax.div(start + sizes.queries, sizes.block)
    mix_QxK, max_Q, sum_Q = jax.lax.fori_loop(sizes.first_key(start), end, absorb, carry)
    out_ref[...] = (mix_QxK / sum_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_Q + jnp.log2(sum_Q)


def gpu_backward(
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
    rows, length, heads, width = q_BxTxHxK.shape
    groups = k_BxTxGxK.shape[2]
    shared = heads // groups
    sizes = _Sizes.of(q_BxTxHxK, window)
    # Of each query, the sum over its keys of weights times their cotangents.
    mean_BxHxT = jnp.einsum(
        "bthk,bthk->bht", out_BxTxHxK, dout_BxTxHxK, preferred_element_type=jnp.float32
    )
    q, k, v, segments, dout = _whole(
        sizes, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segments_BxT, dout_BxTxHxK
    )
    whole, wide = q.shape[1], q.shape[3]
    beyond = ((0, 0), (0, 0), (0, whole - length))
    lse, mean = (jnp.pad(one, beyond) for one in (lse_BxHxT, mean_BxHxT))
    blocks = whole // sizes.block

    def call(kernel: Any, over: int, specs: list[Any], like: list[jax.Array], name: str) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, sizes),
            grid=(blocks, over, rows),
            in_specs=specs,
            out_specs=[block] * len(like),
            out_shape=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in like],
            compiler_params=_parameters(q),
            interpret=interpret,
            name=name,
        )(q, k, v, segments, dout, lse, mean)

    block = pl.BlockSpec((None, sizes.block, None, wide), lambda i, h, b: (b, i, h, 0))
    number = pl.BlockSpec((None, None, sizes.block), lambda i, h, b: (b, h, i))
    keys = pl.BlockSpec((None, whole, None, wide), lambda i, h, b: (b, 0, h // shared, 0))
    of_queries = [block, keys, keys, _row(whole), block, number, number]
    (dq,) = call(_queries_kernel, heads, of_queries, [q], "attention_backward_queries")

    queries = pl.BlockSpec((None, whole, shared, wide), lambda i, g, b: (b, 0, g, 0))
    numbers = pl.BlockSpec((None, shared, whole), lambda i, g, b: (b, g, 0))
    of_keys = [queries, block, block, _row(whole), queries, numbers, numbers]
    dk, dv = call(_keys_kernel, groups, of_keys, [k, v], "attention_backward_keys")
    dq, dk, dv = (one[:, :length, :, :width] for one in (dq, dk, dv))
    return dq, dk, dv


def _queries_kernel(
    sizes: _Sizes,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    segments: Any,
    dout_ref: Any,
    lse_ref: Any,
    mean_ref: Any,
    dq_ref: Any,
) -> None:
    start = pl.program_id(0) * sizes.block
    q_QxK, dout_QxK, lse_Q, mean_Q = q_ref[...], dout_ref[...], lse_ref[...], mean_ref[...]
    query = start, segments[pl.ds(start, sizes.block)]

    def add(turn: jax.Array, dq_QxK: jax.Array) -> jax.Array:
        first = turn * sizes.block
        at = pl.ds(first, sizes.block)
        k_SxK = k_ref[at, :]
        scores_QxS = sizes.masked(_dot(q_QxK, k_SxK, 1, 1), query, (first, segments[at]))
        weights_QxS = jnp.exp2(scores_QxS - lse_Q[:, None])
        dscores_QxS = weights_QxS * (_dot(dout_QxK, v_ref[at, :], 1, 1) - mean_Q[:, None])
        return dq_QxK + _dot(dscores_QxS.astype(k_SxK.dtype), k_SxK, 1, 0)

    dq_QxK = jnp.zeros(q_QxK.shape, jnp.float32)
    dq_QxK = jax.lax.fori_loop(sizes.first_key(start), pl.program_id(0) + 1, add, dq_QxK)
    dq_ref[...] = (dq_QxK * sizes.scale).astype(dq_ref.dtype)


def _keys_kernel(
    sizes: _Sizes,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    segments: Any,
    dout_ref: Any,
    lse_ref: Any,
    mean_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    length, shared, _ = q_ref.shape
    block = pl.program_id(0)
    start = block * sizes.block
    k_SxK, v_SxK = k_ref[...], v_ref[...]
    key = start, segments[pl.ds(start, sizes.block)]

    def of_head(head: jax.Array, carry: Any) -> Any:
        def add(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
            dk_SxK, dv_SxK = carry
            first = turn * sizes.block
            at = pl.ds(first, sizes.block)
            q_QxK, dout_QxK = q_ref[at, head, :], dout_ref[at, head, :]
            scores_QxS = sizes.masked(_dot(q_QxK, k_SxK, 1, 1), (first, segments[at]), key)
            weights_QxS = jnp.exp2(scores_QxS - lse_ref[head, at][:, None])
            dv_SxK += _dot(weights_QxS.astype(dout_QxK.dtype), dout_QxK, 0, 0)
            dweights_QxS = _dot(dout_QxK, v_SxK, 1, 1) - mean_ref[head, at][:, None]
            dscores_QxS = (weights_QxS * dweights_QxS).astype(q_QxK.dtype)
            return dk_SxK + _dot(dscores_QxS, q_QxK, 0, 0), dv_SxK

        end = sizes.end_of_queries(start, length // sizes.block)
        return jax.lax.fori_loop(block, end, add, carry)

    zeros = jnp.zeros(k_SxK.shape, jnp.float32)
    dk_SxK, dv_SxK = jax.lax.fori_loop(0, shared, of_head, (zeros, zeros))
    dk_ref[...] = (dk_SxK * sizes.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_SxK.astype(dv_ref.dtype)


def _whole(sizes: _Sizes, *arrays_BxT: jax.Array) -> list[jax.Array]:
    """Positions to whole blocks, and the width of heads to a power of two, with zeros.

    What is added stands after all positions, so that none of these sees it.
    """
    length = arrays_BxT[0].shape[1]
    whole = whole_blocks(length, sizes.queries) * sizes.queries

    def padded(array: jax.Array) -> jax.Array:
        more = [(0, 0), (0, whole - length)]
        if array.ndim == 4:
            wide = max(_LEAST, pl.next_power_of_2(array.shape[3]))
            more += [(0, 0), (0, wide - array.shape[3])]
        return jnp.pad(array, more)

    return [padded(array) for array in arrays_BxT]


def _row(length: int) -> pl.BlockSpec:
    """The segments of the row."""
    return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))


def _head_bytes(array_BxTxHxK: jax.Array) -> int:
    return pl.next_power_of_2(array_BxTxHxK.shape[-1]) * array_BxTxHxK.dtype.itemsize


def _parameters(q_BxTxHxK: jax.Array) -> Any:
    warps = 4 if _head_bytes(q_BxTxHxK) <= 128 else 8
    return plgpu.CompilerParams(num_warps=warps, num_stages=2)


def _dot(one: jax.Array, other: jax.Array, axis: int, other_axis: int) -> jax.Array:
    # The platform's own precision, as in the XLA form.
    axes = (((axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, axes, preferred_element_type=jnp.float32)
