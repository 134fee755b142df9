"""`many_adapters` as Pallas kernels: forward, and the whole backward pass.

On a TPU one program takes a block of positions of one client with all D inputs and F outputs, and
the sums over positions, da and db, stay in fast memory while the blocks of a client pass by. On a
GPU one program takes a block of positions and walks D and F in tiles; da and db are sums over
programs, which XLA makes afterwards from the R numbers of each position.

Letters: K clients, T positions, D inputs, R rank, F outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from .pallas_forms import LANES, TPU_BYTES, power_of_two_at_most, whole_blocks

# Positions, and columns of D or F, of a tile of the GPU forms; its products need 16 of each side.
_GPU_T, _GPU_C, _GPU_R = 64, 64, 16


def tpu_positions(
    positions: int, width: int, rank: int, outputs: int, itemsize: int, backward: bool
) -> int:
    """Positions of a block, such that all buffers fit into a TPU core's fast memory.

    Raises:
      ValueError: Not even sixteen positions fit.

    >>> tpu_positions(2048, 4096, 16, 4096, 2, True), tpu_positions(2048, 576, 8, 576, 4, False)
    (64, 512)
    """
    d, f = (whole_blocks(size, LANES) * LANES for size in (width, outputs))
    r = whole_blocks(rank, 16) * 16
    # Two buffers of each block. A's rows and da's are R wide and fill whole rows of 128 lanes.
    fixed = 2 * (d * LANES + r * f) * itemsize
    one = 2 * (d + f) * itemsize + 4 * LANES * 4 + f * 4
    if backward:
        fixed += 2 * (d * LANES + r * f) * 4
        one += 2 * d * itemsize + d * 4
    if (room := (TPU_BYTES - fixed) // one) < 16:
        raise ValueError(
            f"the Pallas product with adapters needs {fixed + 16 * one} bytes of fast memory at "
            f'{width} inputs and {outputs} outputs and has {TPU_BYTES}; use implementation "xla"'
        )
    return power_of_two_at_most(min(room, max(positions, 16)), 16, 512)


def _blocks(*shape: int, moving: bool) -> pl.BlockSpec:
    """One client's block: of positions, which move with the grid, or of its adapter."""
    return pl.BlockSpec((None, *shape), lambda k, t: (k, t if moving else 0, 0))


def tpu_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, interpret: bool
) -> jax.Array:
    """y [K, T, F] of the dtype of x."""
    (clients, positions, width), (_, rank, outputs) = x.shape, b.shape
    tile = tpu_positions(positions, width, rank, outputs, x.dtype.itemsize, False)

    def kernel(scale: Any, x: Any, a: Any, b: Any, y: Any) -> None:
        down_TxR = _scaled(_dot(x[...], a[...], 1, 0).astype(x.dtype), scale)
        y[...] = _dot(down_TxR, b[...], 1, 0).astype(y.dtype)

    found: jax.Array = pl.pallas_call(
        kernel,
        grid=(clients, whole_blocks(positions, tile)),
        in_specs=[
            _SCALAR,
            _blocks(tile, width, moving=True),
            _blocks(width, rank, moving=False),
            _blocks(rank, outputs, moving=False),
        ],
        out_specs=_blocks(tile, outputs, moving=True),
        out_shape=jax.ShapeDtypeStruct((clients, positions, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(_in_words(scale), x, a, b)
    return found


def tpu_backward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """dx of the dtype of x; float32 da [K, D, R], db [K, R, F] and dscale []."""
    (clients, positions, width), (_, rank, outputs) = x.shape, b.shape
    tile = tpu_positions(positions, width, rank, outputs, x.dtype.itemsize, True)

    def kernel(
        scale: Any, x: Any, a: Any, b: Any, dy: Any, dx: Any, da: Any, db: Any, dscale: Any
    ) -> None:
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _() -> None:
            for total in (da, db, dscale):
                total[...] = jnp.zeros(total.shape, total.dtype)

        x_TxD, dy_TxF = x[...], dy[...]
        if positions % tile:
            # What lies beyond the last position is undefined and would enter the sums.
            x_TxD, dy_TxF = (
                _rows_within(array, step * tile, positions) for array in (x_TxD, dy_TxF)
            )
        down_TxR = _dot(x_TxD, a[...], 1, 0).astype(x.dtype)
        u_TxR = _dot(dy_TxF, b[...], 1, 1).astype(x.dtype)
        product = u_TxR.astype(jnp.float32) * down_TxR.astype(jnp.float32)
        dscale[...] += jnp.sum(product, axis=0, keepdims=True)
        u_TxR = _scaled(u_TxR, scale)
        dx[...] = _dot(u_TxR, a[...], 1, 1).astype(dx.dtype)
        da[...] += _dot(x_TxD, u_TxR, 0, 0)
        db[...] += _dot(_scaled(down_TxR, scale), dy_TxF, 0, 0)

    dx, da, db, dscale = pl.pallas_call(
        kernel,
        grid=(clients, whole_blocks(positions, tile)),
        in_specs=[
            _SCALAR,
            _blocks(tile, width, moving=True),
            _blocks(width, rank, moving=False),
            _blocks(rank, outputs, moving=False),
            _blocks(tile, outputs, moving=True),
        ],
        out_specs=[
            _blocks(tile, width, moving=True),
            _blocks(width, rank, moving=False),
            _blocks(rank, outputs, moving=False),
            _blocks(1, rank, moving=False),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(a.shape, jnp.float32),
            jax.ShapeDtypeStruct(b.shape, jnp.float32),
            jax.ShapeDtypeStruct((clients, 1, rank), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(_in_words(scale), x, a, b, dy)
    return dx, da, db, jnp.sum(dscale)


# In the memory of scalars, from where one number multiplies a whole block.
_SCALAR = pl.BlockSpec(memory_space=pltpu.SMEM)


def _in_words(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float32).reshape(1)


def _scaled(x: jax.Array, scale: Any) -> jax.Array:
    # Not every TPU multiplies bfloat16; in float32 the product is exact, and rounded once.
    return (x.astype(jnp.float32) * scale[0]).astype(x.dtype)


def _rows_within(x_TxC: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    row = first + jax.lax.broadcasted_iota(jnp.int32, x_TxC.shape, 0)
    return jnp.where(row < rows, x_TxC, jnp.zeros_like(x_TxC))


def gpu_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, interpret: bool
) -> jax.Array:
    """As `tpu_forward`."""
    (clients, positions, width), (_, rank, outputs) = x.shape, b.shape
    r = _gpu_rank(rank)

    def kernel(scale: Any, x: Any, a: Any, b: Any, y: Any) -> None:
        k, row_T, narrow_R = _place(r)
        down_TxR = _contract(
            width,
            lambda at: _tile(x, k, (row_T, positions), (at[None, :], width)),
            lambda at: _tile(a, k, (at[:, None], width), (narrow_R, rank)),
            (_GPU_T, r),
        )
        down_TxR = down_TxR.astype(x.dtype) * scale[0]

        def write(step: jax.Array, _: None) -> None:
            at = _columns(step)[None, :]
            b_RxC = _tile(b, k, (narrow_R.reshape(r, 1), rank), (at, outputs))
            y_TxC = _dot(down_TxR, b_RxC, 1, 0).astype(y.dtype)
            plgpu.store(y.at[k, row_T, at], y_TxC, mask=(row_T < positions) & (at < outputs))

        jax.lax.fori_loop(0, whole_blocks(outputs, _GPU_C), write, None)

    found: jax.Array = pl.pallas_call(
        kernel,
        grid=(whole_blocks(positions, _GPU_T), clients),
        out_shape=jax.ShapeDtypeStruct((clients, positions, outputs), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(scale.reshape(1), x, a, b)
    return found


def gpu_backward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """As `tpu_backward`."""
    (clients, positions, width), (_, rank, outputs) = x.shape, b.shape
    r = _gpu_rank(rank)

    def kernel(scale: Any, x: Any, a: Any, b: Any, dy: Any, dx: Any, down: Any, u: Any) -> None:
        k, row_T, narrow_R = _place(r)
        down_TxR = _contract(
            width,
            lambda at: _tile(x, k, (row_T, positions), (at[None, :], width)),
            lambda at: _tile(a, k, (at[:, None], width), (narrow_R, rank)),
            (_GPU_T, r),
        )
        u_TxR = _contract(
            outputs,
            lambda at: _tile(dy, k, (row_T, positions), (at[None, :], outputs)),
            lambda at: _tile(b, k, (narrow_R, rank), (at[:, None], outputs)),
            (_GPU_T, r),
        )
        within = (row_T < positions) & (narrow_R < rank)
        plgpu.store(down.at[k, row_T, narrow_R], down_TxR.astype(down.dtype), mask=within)
        plgpu.store(u.at[k, row_T, narrow_R], u_TxR.astype(u.dtype), mask=within)
        u_TxR = u_TxR.astype(x.dtype) * scale[0]

        def write(step: jax.Array, _: None) -> None:
            at = _columns(step)[None, :]
            a_RxC = _tile(a, k, (at, width), (narrow_R.reshape(r, 1), rank))
            dx_TxC = _dot(u_TxR, a_RxC, 1, 0).astype(dx.dtype)
            plgpu.store(dx.at[k, row_T, at], dx_TxC, mask=(row_T < positions) & (at < width))

        jax.lax.fori_loop(0, whole_blocks(width, _GPU_C), write, None)

    narrow = jax.ShapeDtypeStruct((clients, positions, rank), x.dtype)
    dx, down_KxTxR, u_KxTxR = pl.pallas_call(
        kernel,
        grid=(whole_blocks(positions, _GPU_T), clients),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), narrow, narrow],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(scale.reshape(1), x, a, b, dy)
    dscale = u_KxTxR.astype(jnp.float32) * down_KxTxR.astype(jnp.float32)
    sums = [
        jnp.einsum("ktp,ktq->kpq", one, other, preferred_element_type=jnp.float32)
        for one, other in ((x, u_KxTxR * scale), (down_KxTxR * scale, dy))
    ]
    return dx, *sums, jnp.sum(dscale)


def _gpu_rank(rank: int) -> int:
    return max(_GPU_R, pl.next_power_of_2(rank))


def _place(rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The program's client, its positions [T, 1], and the places along the rank [1, R]."""
    row_T = pl.program_id(0) * _GPU_T + jnp.arange(_GPU_T, dtype=jnp.int32)
    return pl.program_id(1), row_T[:, None], jnp.arange(rank, dtype=jnp.int32)[None, :]


def _columns(step: jax.Array) -> jax.Array:
    return step * _GPU_C + jnp.arange(_GPU_C, dtype=jnp.int32)


def _tile(
    ref: Any, k: jax.Array, first: tuple[jax.Array, int], second: tuple[jax.Array, int]
) -> jax.Array:
    """Entries of one client at places along both axes, zero beyond the limits."""
    (row, rows), (column, columns) = first, second
    within = (row < rows) & (column < columns)
    tile: jax.Array = plgpu.load(ref.at[k, row, column], mask=within, other=0.0)
    return tile


def _contract(
    size: int,
    left: Callable[[jax.Array], jax.Array],
    right: Callable[[jax.Array], jax.Array],
    shape: tuple[int, int],
) -> jax.Array:
    """The product of two matrices, tile by tile of the axis that is summed over, in float32."""

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at = _columns(step)
        return total + _dot(left(at), right(at), 1, 0)

    start = jnp.zeros(shape, jnp.float32)
    total: jax.Array = jax.lax.fori_loop(0, whole_blocks(size, _GPU_C), add, start)
    return total


def _dot(one: jax.Array, other: jax.Array, axis: int, other_axis: int) -> jax.Array:
    # The platform's own precision, as in the XLA form.
    axes = (((axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, axes, preferred_element_type=jnp.float32)
