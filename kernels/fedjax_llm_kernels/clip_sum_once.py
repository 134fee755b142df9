"""`clip_sum` on a TPU in one pass: an example is read once, measured and added where it lies.

The arrays of one example and the sums so far are in fast memory together, which takes 16 bytes an
element (two buffers each). Adapters of small models fit: 786,432 elements are the limit.

The norm is understated by no more than `clip_norm` allows for: 128 terms, 128 of such sums, then 64
rows and 128 lanes make at most 448 terms behind a partial sum of an array, and each array adds one.

Letters: E examples, P elements of an array, M rows of 128 elements.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .clip_norm import shortening
from .float_bits import exponent, magnitude_bits, normal_and_finite, power_of_two
from .pallas_forms import LANES, ROWS, TPU_BYTES

_TERMS = 128
# Rows that are taken at once, where they divide the rows of an array.
_MOST_ROWS = 64
_MOST_ARRAYS = 448


def fits(arrays_ExP: list[jax.Array]) -> bool:
    """Whether the arrays of one example fill whole tiles and fit into fast memory with the sums."""
    sizes = [array_ExP.shape[1] for array_ExP in arrays_ExP]
    whole = all(size % (ROWS * LANES) == 0 for size in sizes)
    return whole and 16 * sum(sizes) <= TPU_BYTES and len(sizes) <= _MOST_ARRAYS


def tpu_once(
    arrays_ExP: list[jax.Array], counts_E: jax.Array, bound: jax.Array, *, interpret: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Sums [P] and norms [E]."""
    examples = counts_E.shape[0]
    arrays = [array_ExP.reshape(examples, -1, LANES) for array_ExP in arrays_ExP]
    rows = [array.shape[1] for array in arrays]
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    *sums, norm_Ex1x128 = pl.pallas_call(
        _kernel,
        grid=(examples,),
        in_specs=[
            scalars,
            scalars,
            *(pl.BlockSpec((None, m, LANES), lambda e: (e, 0, 0)) for m in rows),
        ],
        out_specs=[
            *(pl.BlockSpec((m, LANES), lambda e: (0, 0)) for m in rows),
            pl.BlockSpec((None, 1, LANES), lambda e: (e, 0, 0)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct((m, LANES), jnp.float32) for m in rows),
            jax.ShapeDtypeStruct((examples, 1, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )(counts_E.astype(jnp.int32), bound.reshape(1), *arrays)
    return [summed.reshape(-1) for summed in sums], norm_Ex1x128[:, 0, 0]


def _kernel(counts: Any, bound: Any, *refs: Any) -> None:
    count = (len(refs) - 1) // 2
    arrays, sums, norm_out = refs[:count], refs[count : 2 * count], refs[-1]
    example = pl.program_id(0)

    @pl.when(example == 0)
    def _() -> None:
        for summed in sums:
            summed[...] = jnp.zeros(summed.shape, jnp.float32)

    peak = jnp.zeros((1, 1), jnp.int32)
    for array in arrays:
        peak = jnp.maximum(peak, _largest(array))
    normal, finite = normal_and_finite(peak)
    top = jnp.where(normal, exponent(peak), jnp.int32(127))
    shrink, grow = power_of_two(127 - top), power_of_two(top - 127)
    total = jnp.zeros((1, 1), jnp.float32)
    for array in arrays:
        total = total + _squares(array, shrink)
    how, norm = shortening(bound[0], shrink, grow, normal, finite, jnp.sqrt(total))
    one = jnp.float32(1)
    first, second = jnp.where(how.keep, one, shrink), jnp.where(how.keep, one, how.scale)
    used = how.normal & (counts[example] > 0)
    for array, summed in zip(arrays, sums, strict=True):
        _add(array, summed, first, second, used)
    norm_out[...] = jnp.broadcast_to(norm, norm_out.shape)


def _chunks(array: Any) -> tuple[int, int]:
    """Rows of a chunk, and how many there are."""
    rows = math.gcd(array.shape[0], _MOST_ROWS)
    return rows, array.shape[0] // rows


def _chunk(k: jax.Array, rows: int) -> Any:
    return pl.ds(pl.multiple_of(k * rows, rows), rows), slice(None)


def _largest(array: Any) -> jax.Array:
    rows, chunks = _chunks(array)

    def turn(k: jax.Array, peak: jax.Array) -> jax.Array:
        return jnp.maximum(peak, magnitude_bits(array[_chunk(k, rows)]))

    peak = jax.lax.fori_loop(0, chunks, turn, jnp.zeros((rows, LANES), jnp.int32))
    return jnp.max(jnp.max(peak, axis=0, keepdims=True), axis=1, keepdims=True)


def _squares(array: Any, shrink: jax.Array) -> jax.Array:
    """[1, 1]: the sum of (x * shrink)^2, in sums of 128 terms."""
    rows, chunks = _chunks(array)
    zeros = jnp.zeros((rows, LANES), jnp.float32)

    def terms(first: jax.Array | int, count: int) -> jax.Array:
        def turn(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.square(array[_chunk(first + k, rows)] * shrink)

        summed: jax.Array = jax.lax.fori_loop(0, count, turn, zeros)
        return summed

    def block(k: jax.Array, total: jax.Array) -> jax.Array:
        return total + terms(k * _TERMS, _TERMS)

    blocks, rest = divmod(chunks, _TERMS)
    total = jax.lax.fori_loop(0, blocks, block, zeros) + terms(blocks * _TERMS, rest)
    return jnp.sum(jnp.sum(total, axis=0, keepdims=True), axis=1, keepdims=True)


def _add(array: Any, summed: Any, first: jax.Array, second: jax.Array, used: jax.Array) -> None:
    rows, chunks = _chunks(array)

    def turn(k: jax.Array, _: None) -> None:
        place = _chunk(k, rows)
        scaled = (array[place] * first) * second
        summed[place] += jnp.where(used, scaled, jnp.float32(0))

    jax.lax.fori_loop(0, chunks, turn, None)
