"""`clip_sum` as Pallas kernels: one pass that measures, one that shortens and adds.

The pass that measures cannot know the largest magnitude before it has seen all values, so each lane
keeps its own: a largest magnitude m, and the sum of (x 2^-k)^2 with 2^k next to m. Where m grows,
the sum is multiplied by a power of two, which is exact. Lanes are joined in the same way.

The norm is understated by no more than `clip_norm` allows for: a lane adds at most 128 terms, and
`block_sum` joins the lanes, at most 2^40 of them, in six levels of 128; so no partial sum has more
than 128 * 7 terms behind it. A product with a power of two rounds only where it is denormal, by
less than 2^-125 beside a sum of at least 1.

Letters: E examples, P elements of an array, L lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from .clip_norm import Shortening, block_sum, shortening
from .clip_sum_once import fits, tpu_once
from .float_bits import exponent, magnitude_bits, normal_and_finite, power_of_two
from .pallas_forms import LANES, ROWS, whole_blocks

# TPU: lanes add 128 values; 2^14 elements of eight examples are measured at a time. GPU: a program
# measures 2^15 elements of one example in 1,024 lanes.
_TPU_TURNS, _TPU_SUM = 128, 4096
_GPU_LANES, _GPU_TURNS = 1024, 32


def tpu_clip_sum(
    arrays_ExP: list[jax.Array], counts_E: jax.Array, bound: jax.Array, *, interpret: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Sums [P] and norms [E]; in one pass where the arrays of an example fit."""
    if fits(arrays_ExP):
        return tpu_once(arrays_ExP, counts_E, bound, interpret=interpret)
    return _two_passes(_tpu_lanes, _tpu_sum, arrays_ExP, counts_E, bound, interpret)


def gpu_clip_sum(
    arrays_ExP: list[jax.Array], counts_E: jax.Array, bound: jax.Array, *, interpret: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Sums [P] and norms [E]."""
    return _two_passes(_gpu_lanes, _gpu_sum, arrays_ExP, counts_E, bound, interpret)


def _two_passes(
    lanes: Any,
    add: Any,
    arrays_ExP: list[jax.Array],
    counts_E: jax.Array,
    bound: jax.Array,
    interpret: bool,
) -> tuple[list[jax.Array], jax.Array]:
    found = [lanes(array_ExP, interpret) for array_ExP in arrays_ExP]
    peaks_ExL, sums_ExL = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    how_E, norm_E = join_lanes(peaks_ExL, sums_ExL, bound)
    one = jnp.float32(1)
    factors = (
        jnp.where(how_E.keep, one, how_E.shrink),
        jnp.where(how_E.keep, one, how_E.scale),
        (how_E.normal & counts_E).astype(jnp.float32),
    )
    return [add(array_ExP, factors, interpret) for array_ExP in arrays_ExP], norm_E


def join_lanes(
    peaks_ExL: jax.Array, sums_ExL: jax.Array, bound: jax.Array
) -> tuple[Shortening, jax.Array]:
    """How each example is shortened, and its norm [E], from the state of its lanes."""
    peak_E = jnp.max(peaks_ExL, axis=1)
    normal_E, finite_E = normal_and_finite(peak_E)
    top_E = jnp.where(normal_E, exponent(peak_E), jnp.int32(127))
    ratio_ExL = power_of_two(exponent(peaks_ExL) - top_E[:, None])
    sum_E = jax.vmap(block_sum)(sums_ExL * ratio_ExL * ratio_ExL)
    shrink_E, grow_E = power_of_two(127 - top_E), power_of_two(top_E - 127)
    return shortening(bound, shrink_E, grow_E, normal_E, finite_E, jnp.sqrt(sum_E))


def absorb(peak: jax.Array, total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude (int32 bits) and the sum of squares beside it, with one value more."""
    new_peak = jnp.maximum(peak, magnitude_bits(x))
    top = exponent(new_peak)
    ratio = power_of_two(exponent(peak) - top)
    return new_peak, total * ratio * ratio + jnp.square(x * power_of_two(127 - top))


def _tpu_lanes(x_ExP: jax.Array, interpret: bool) -> list[jax.Array]:
    examples, size = x_ExP.shape
    turns = min(_TPU_TURNS, whole_blocks(size, LANES))
    tile = turns * LANES
    shape = (examples, whole_blocks(size, tile) * LANES)

    def kernel(x: Any, peaks: Any, sums: Any) -> None:
        first = pl.program_id(1) * tile
        lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

        def turn(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start = pl.multiple_of(k * LANES, LANES)
            part = x[:, pl.ds(start, LANES)]
            # What lies beyond the last element is undefined.
            part = jnp.where(first + start + lane < size, part, jnp.float32(0))
            return absorb(*state, part)

        start = jnp.zeros((ROWS, LANES), jnp.int32), jnp.zeros((ROWS, LANES), jnp.float32)
        peaks[...], sums[...] = jax.lax.fori_loop(0, turns, turn, start)

    found: list[jax.Array] = pl.pallas_call(
        kernel,
        grid=(whole_blocks(examples, ROWS), whole_blocks(size, tile)),
        in_specs=[pl.BlockSpec((ROWS, tile), lambda e, p: (e, p))],
        out_specs=[pl.BlockSpec((ROWS, LANES), lambda e, p: (e, p))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(x_ExP)
    return found


def _tpu_sum(x_ExP: jax.Array, factors_E: tuple[jax.Array, ...], interpret: bool) -> jax.Array:
    examples, size = x_ExP.shape
    tile = min(_TPU_SUM, whole_blocks(size, LANES) * LANES)
    # Whole blocks of examples; those that fill the last one are not used, whatever they hold.
    filled = [jnp.pad(f_E, (0, -examples % ROWS))[:, None] for f_E in factors_E]

    def kernel(x: Any, first: Any, second: Any, used: Any, out: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            out[...] = jnp.zeros(out.shape, jnp.float32)

        scaled = (x[...] * first[...]) * second[...]
        kept = jnp.where(used[...] > 0, scaled, jnp.float32(0))
        out[...] += jnp.sum(kept, axis=0, keepdims=True)

    column = pl.BlockSpec((ROWS, 1), lambda p, e: (e, 0))
    summed: jax.Array = pl.pallas_call(
        kernel,
        grid=(whole_blocks(size, tile), whole_blocks(examples, ROWS)),
        in_specs=[pl.BlockSpec((ROWS, tile), lambda p, e: (e, p)), column, column, column],
        out_specs=pl.BlockSpec((1, tile), lambda p, e: (0, p)),
        out_shape=jax.ShapeDtypeStruct((1, size), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(x_ExP, *filled)
    return summed[0]


def _gpu_lanes(x_ExP: jax.Array, interpret: bool) -> list[jax.Array]:
    examples, size = x_ExP.shape
    turns = min(_GPU_TURNS, whole_blocks(size, _GPU_LANES))
    programs = whole_blocks(size, turns * _GPU_LANES)

    def kernel(x: Any, peaks: Any, sums: Any) -> None:
        part, example = pl.program_id(0), pl.program_id(1)
        lane_L = jnp.arange(_GPU_LANES, dtype=jnp.int32)

        def turn(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            place_L = (part * turns + k) * _GPU_LANES + lane_L
            x_L = plgpu.load(x.at[example, place_L], mask=place_L < size, other=0.0)
            return absorb(*state, x_L)

        start = jnp.zeros((_GPU_LANES,), jnp.int32), jnp.zeros((_GPU_LANES,), jnp.float32)
        peak_L, sum_L = jax.lax.fori_loop(0, turns, turn, start)
        place_L = part * _GPU_LANES + lane_L
        plgpu.store(peaks.at[example, place_L], peak_L)
        plgpu.store(sums.at[example, place_L], sum_L)

    shape = (examples, programs * _GPU_LANES)
    found: list[jax.Array] = pl.pallas_call(
        kernel,
        grid=(programs, examples),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x_ExP)
    return found


def _gpu_sum(x_ExP: jax.Array, factors_E: tuple[jax.Array, ...], interpret: bool) -> jax.Array:
    examples, size = x_ExP.shape

    def kernel(x: Any, first: Any, second: Any, used: Any, out: Any) -> None:
        place_L = pl.program_id(0) * _GPU_LANES + jnp.arange(_GPU_LANES, dtype=jnp.int32)

        def add(example: jax.Array, total_L: jax.Array) -> jax.Array:
            x_L = plgpu.load(x.at[example, place_L], mask=place_L < size, other=0.0)
            scaled_L = (x_L * first[example]) * second[example]
            return total_L + jnp.where(used[example] > 0, scaled_L, jnp.float32(0))

        start = jnp.zeros((_GPU_LANES,), jnp.float32)
        total_L = jax.lax.fori_loop(0, examples, add, start)
        plgpu.store(out.at[place_L], total_L, mask=place_L < size)

    summed: jax.Array = pl.pallas_call(
        kernel,
        grid=(whole_blocks(size, _GPU_LANES),),
        out_shape=jax.ShapeDtypeStruct((size,), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x_ExP, *factors_E)
    return summed
