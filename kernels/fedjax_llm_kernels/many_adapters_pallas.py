"""`many_adapters` as Pallas kernels: forward, and the whole backward pass.

On a TPU one program takes a block of positions of one client with all D inputs and F outputs, and
the sums over positions, da and db, stay in fast memory while the blocks of a client pass by. On a
GPU one program takes a block of positions and walks D and F in tiles; da and db are sums over
programs, which XLA makes afterwards from the R numbers of each position.

Several products of the same activations are one call: a is one matrix, whose columns all of them
use, and each has a b of its own, with R rows. A scale is a factor of b.

Letters: K clients, T positions, D inputs, R rank, F outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from .pallas_forms import LANES, TPU_BYTES, power_of_two_at_most, whole_blocks

type Sides = tuple[jax.Array, ...]

# Positions, and columns of D or F, of a tile of the GPU forms; its products need 16 of each side.
_GPU_T, _GPU_C, _GPU_R = 64, 64, 16


def tpu_positions(
    positions: int,
    width: int,
    rank: int,
    outputs: Sequence[int],
    itemsize: int,
    backward: bool,
) -> int:
    """Positions of a block, such that all buffers fit into a TPU core's fast memory.

    Raises:
      ValueError: Not even sixteen positions fit.

    >>> tpu_positions(2048, 4096, 16, [4096], 2, True), tpu_positions(9, 576, 8, [576], 4, False)
    (64, 16)
    """
    fixed, one = _tpu_bytes(width, rank, outputs, itemsize, backward)
    if (room := (TPU_BYTES - fixed) // one) < 16:
        raise ValueError(
            f"the Pallas product with adapters needs {fixed + 16 * one} bytes of fast memory at "
            f"{width} inputs and {sum(outputs)} outputs and has {TPU_BYTES}; "
            'use implementation "xla"'
        )
    return power_of_two_at_most(min(room, max(positions, 16)), 16, 512)


def tpu_holds(width: int, rank: int, outputs: Sequence[int], itemsize: int, backward: bool) -> bool:
    """Whether the fast memory of a TPU core is enough for sixteen positions.

    >>> tpu_holds(2048, 16, [8192, 8192], 2, True), tpu_holds(8192, 8, [2048], 2, True)
    (True, False)
    """
    fixed, one = _tpu_bytes(width, rank, outputs, itemsize, backward)
    return fixed + 16 * one <= TPU_BYTES


def _tpu_bytes(
    width: int, rank: int, outputs: Sequence[int], itemsize: int, backward: bool
) -> tuple[int, int]:
    """What a program needs whatever its positions are, and for each of them."""
    d, *each_f = (whole_blocks(size, LANES) * LANES for size in (width, *outputs))
    f, r = sum(each_f), whole_blocks(rank, 16) * 16
    # Two buffers of each block. A's rows and da's are R wide and fill whole rows of 128 lanes.
    fixed = 2 * (d * LANES + r * f) * itemsize
    one = 2 * (d + f) * itemsize + 4 * LANES * 4 + f * 4
    if backward:
        fixed += 2 * (d * LANES + r * f) * 4
        one += 2 * d * itemsize + d * 4
    return fixed, one


def _moving(tile: int, columns: int) -> pl.BlockSpec:
    """A block of one client's positions."""
    return pl.BlockSpec((None, tile, columns), lambda k, t: (k, t, 0))


def _staying(side: jax.Array) -> pl.BlockSpec:
    """One client's side of an adapter, for all of its positions."""
    return pl.BlockSpec((None, *side.shape[1:]), lambda k, t: (k, 0, 0))


def tpu_forward(x: jax.Array, a: jax.Array, b: Sides, *, interpret: bool) -> Sides:
    """y [K, T, F] for each b, of the dtype of x."""
    clients, positions, width = x.shape
    outputs = [one.shape[2] for one in b]
    tile = tpu_positions(positions, width, a.shape[2], outputs, x.dtype.itemsize, False)

    def kernel(x: Any, a: Any, b: Any, y: Any) -> None:
        down_TxR = _dot(x[...], a[...], 1, 0).astype(x.dtype)
        for b_RxF, y_TxF in zip(b, y, strict=True):
            y_TxF[...] = _dot(down_TxR, b_RxF[...], 1, 0).astype(y_TxF.dtype)

    shapes = tuple(jax.ShapeDtypeStruct((clients, positions, f), x.dtype) for f in outputs)
    (found,) = pl.pallas_call(
        kernel,
        grid=(clients, whole_blocks(positions, tile)),
        in_specs=[_moving(tile, width), _staying(a), tuple(map(_staying, b))],
        out_specs=[tuple(_moving(tile, f) for f in outputs)],
        out_shape=[shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(x, a, b)
    return tuple(found)


def tpu_backward(
    x: jax.Array, a: jax.Array, b: Sides, dy: Sides, *, interpret: bool
) -> tuple[jax.Array, jax.Array, Sides]:
    """dx of the dtype of x; float32 da [K, D, R], and db [K, R, F] for each b."""
    clients, positions, width = x.shape
    outputs = [one.shape[2] for one in b]
    tile = tpu_positions(positions, width, a.shape[2], outputs, x.dtype.itemsize, True)

    def kernel(x: Any, a: Any, b: Any, dy: Any, dx: Any, da: Any, db: Any) -> None:
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _() -> None:
            for total in (da, *db):
                total[...] = jnp.zeros(total.shape, total.dtype)

        def rows(ref: Any) -> jax.Array:
            block_TxC: jax.Array = ref[...]
            if positions % tile:
                # What lies beyond the last position is undefined and would enter the sums.
                return _rows_within(block_TxC, step * tile, positions)
            return block_TxC

        x_TxD = rows(x)
        down_TxR = _dot(x_TxD, a[...], 1, 0).astype(x.dtype)
        u_TxR = jnp.zeros(down_TxR.shape, jnp.float32)
        for b_RxF, dy_ref, db_RxF in zip(b, dy, db, strict=True):
            dy_TxF = rows(dy_ref)
            u_TxR += _dot(dy_TxF, b_RxF[...], 1, 1)
            db_RxF[...] += _dot(down_TxR, dy_TxF, 0, 0)
        u_TxR = u_TxR.astype(x.dtype)
        dx[...] = _dot(u_TxR, a[...], 1, 1).astype(dx.dtype)
        da[...] += _dot(x_TxD, u_TxR, 0, 0)

    sides = [_staying(a), tuple(map(_staying, b))]
    shapes = jax.tree.map(lambda side: jax.ShapeDtypeStruct(side.shape, jnp.float32), [a, b])
    dx, da, db = pl.pallas_call(
        kernel,
        grid=(clients, whole_blocks(positions, tile)),
        in_specs=[_moving(tile, width), *sides, tuple(_moving(tile, f) for f in outputs)],
        out_specs=[_moving(tile, width), *sides],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(x, a, b, dy)
    return dx, da, tuple(db)


def _rows_within(x_TxC: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    row = first + jax.lax.broadcasted_iota(jnp.int32, x_TxC.shape, 0)
    return jnp.where(row < rows, x_TxC, jnp.zeros_like(x_TxC))


def gpu_forward(x: jax.Array, a: jax.Array, b: Sides, *, interpret: bool) -> Sides:
    """As `tpu_forward`."""
    (clients, positions, width), rank = x.shape, a.shape[2]

    def kernel(x: Any, a: Any, b: Any, y: Any) -> None:
        place = _Place.of(positions, rank)
        down_TxR = _narrowed(place, x, a, width).astype(x.dtype)
        for one, out in zip(b, y, strict=True):
            _widened(place, down_TxR, one, out, out.shape[2])

    out = tuple(jax.ShapeDtypeStruct((clients, positions, one.shape[2]), x.dtype) for one in b)
    (found,) = _gpu_call(kernel, clients, positions, [out], interpret)(x, a, b)
    return tuple(found)


def gpu_backward(
    x: jax.Array, a: jax.Array, b: Sides, dy: Sides, *, interpret: bool
) -> tuple[jax.Array, jax.Array, Sides]:
    """As `tpu_backward`."""
    (clients, positions, width), rank = x.shape, a.shape[2]

    def kernel(x: Any, a: Any, b: Any, dy: Any, dx: Any, down: Any, u: Any) -> None:
        place = _Place.of(positions, rank)
        place.keep(down, _narrowed(place, x, a, width))
        first, *others = (
            _narrowed(place, wide, one, wide.shape[2], transposed=True)
            for wide, one in zip(dy, b, strict=True)
        )
        u_TxR = sum(others, first)
        place.keep(u, u_TxR)
        _widened(place, u_TxR.astype(x.dtype), a, dx, width, transposed=True)

    narrow = jax.ShapeDtypeStruct((clients, positions, rank), x.dtype)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), narrow, narrow]
    dx, down_KxTxR, u_KxTxR = _gpu_call(kernel, clients, positions, out, interpret)(x, a, b, dy)

    def summed(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.einsum("ktp,ktq->kpq", one, other, preferred_element_type=jnp.float32)

    return dx, summed(x, u_KxTxR), tuple(summed(down_KxTxR, wide) for wide in dy)


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
