"""`many_adapters` as Pallas kernels: forward, and the whole backward pass.

On a TPU one program takes a block of positions of one client with all D inputs and F outputs, and
the sums over positions, da and db, stay in fast memory while the blocks of a client pass by. On a
GPU one program takes a block of positions and walks D and F in tiles; da and db are sums over
programs, which XLA makes afterwards from the R numbers of each position.

Letters: K clients, T positions, D inputs, R rank, F outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def _inputs(tile: int, width: int, rank: int, outputs: int) -> list[pl.BlockSpec]:
    """Where a program finds the scale, x, a and b."""
    return [
        _SCALAR,
        _blocks(tile, width, moving=True),
        _blocks(width, rank, moving=False),
        _blocks(rank, outputs, moving=False),
    ]


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
        in_specs=_inputs(tile, width, rank, outputs),
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
        in_specs=[*_inputs(tile, width, rank, outputs), _blocks(tile, outputs, moving=True)],
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

    def kernel(scale: Any, x: Any, a: Any, b: Any, y: Any) -> None:
        place = _Place.of(positions, rank)
        down_TxR = _narrowed(place, x, a, width).astype(x.dtype) * scale[0]
        _widened(place, down_TxR, b, y, outputs)

    out = jax.ShapeDtypeStruct((clients, positions, outputs), x.dtype)
    found: jax.Array = _gpu_call(kernel, clients, positions, out, interpret)(
        scale.reshape(1), x, a, b
    )
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

    def kernel(scale: Any, x: Any, a: Any, b: Any, dy: Any, dx: Any, down: Any, u: Any) -> None:
        place = _Place.of(positions, rank)
        down_TxR = _narrowed(place, x, a, width)
        u_TxR = _narrowed(place, dy, b, outputs, transposed=True)
        place.keep(down, down_TxR)
        place.keep(u, u_TxR)
        _widened(place, u_TxR.astype(x.dtype) * scale[0], a, dx, width, transposed=True)

    narrow = jax.ShapeDtypeStruct((clients, positions, rank), x.dtype)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), narrow, narrow]
    dx, down_KxTxR, u_KxTxR = _gpu_call(kernel, clients, positions, out, interpret)(
        scale.reshape(1), x, a, b, dy
    )
    dscale = u_KxTxR.astype(jnp.float32) * down_KxTxR.astype(jnp.float32)
    sums = [
        jnp.einsum("ktp,ktq->kpq", one, other, preferred_element_type=jnp.float32)
        for one, other in ((x, u_KxTxR * scale), (down_KxTxR * scale, dy))
    ]
    return dx, *sums, jnp.sum(dscale)


def _gpu_call(
    kernel: Callable[..., None], clients: int, positions: int, out: Any, interpret: bool
) -> Callable[..., Any]:
    call: Callable[..., Any] = pl.pallas_call(
        kernel,
        grid=(whole_blocks(positions, _GPU_T), clients),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    return call


class _Place(NamedTuple):
    """Where a program of the GPU forms works.

    Attributes:
      k: its client.
      rows: its positions [T, 1], and how many there are in all.
      ranks: the places along the rank [1, R], and the rank.
    """

    k: jax.Array
    rows: tuple[jax.Array, int]
    ranks: tuple[jax.Array, int]

    @classmethod
    def of(cls, positions: int, rank: int) -> "_Place":
        row_T = pl.program_id(0) * _GPU_T + jnp.arange(_GPU_T, dtype=jnp.int32)
        narrow_R = jnp.arange(max(_GPU_R, pl.next_power_of_2(rank)), dtype=jnp.int32)
        return cls(pl.program_id(1), (row_T[:, None], positions), (narrow_R[None, :], rank))

    def keep(self, ref: Any, narrow_TxR: jax.Array) -> None:
        """Writes what is as wide as the rank."""
        _store(ref, self.k, self.rows, self.ranks, narrow_TxR)


def _narrowed(
    place: _Place, wide: Any, matrix: Any, size: int, transposed: bool = False
) -> jax.Array:
    """Rows [T, size] times the client's matrix [size, R], or [R, size] transposed, in float32.

    Tile by tile of the axis that is summed over.
    """
    k, rows, ranks = place

    def add(step: jax.Array, total_TxR: jax.Array) -> jax.Array:
        at = _columns(step)
        wide_TxC, along = _tile(wide, k, rows, (at[None, :], size)), (at[:, None], size)
        places = (ranks, along) if transposed else (along, ranks)
        return total_TxR + _dot(wide_TxC, _tile(matrix, k, *places), 1, 0)

    start = jnp.zeros((_GPU_T, ranks[0].size), jnp.float32)
    total: jax.Array = jax.lax.fori_loop(0, whole_blocks(size, _GPU_C), add, start)
    return total


def _widened(
    place: _Place, narrow_TxR: jax.Array, matrix: Any, out: Any, size: int, transposed: bool = False
) -> None:
    """Writes rows [T, R] times the client's matrix [R, size], or [size, R] transposed."""
    k, rows, (narrow_R, rank) = place
    ranks = (narrow_R.reshape(-1, 1), rank)

    def write(step: jax.Array, _: None) -> None:
        across = (_columns(step)[None, :], size)
        places = (across, ranks) if transposed else (ranks, across)
        _store(out, k, rows, across, _dot(narrow_TxR, _tile(matrix, k, *places), 1, 0))

    jax.lax.fori_loop(0, whole_blocks(size, _GPU_C), write, None)


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


def _store(
    ref: Any,
    k: jax.Array,
    first: tuple[jax.Array, int],
    second: tuple[jax.Array, int],
    tile: jax.Array,
) -> None:
    """Writes entries of one client within the limits."""
    (row, rows), (column, columns) = first, second
    within = (row < rows) & (column < columns)
    plgpu.store(ref.at[k, row, column], tile.astype(ref.dtype), mask=within)


def _dot(one: jax.Array, other: jax.Array, axis: int, other_axis: int) -> jax.Array:
    # The platform's own precision, as in the XLA form.
    axes = (((axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, axes, preferred_element_type=jnp.float32)
