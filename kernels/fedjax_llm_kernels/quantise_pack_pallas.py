"""`quantise_pack` as Pallas kernels: numbers and random bits in, words out, nothing in between.

A word is made of numbers that are neighbours in memory. On a GPU a thread takes a group of 32
numbers, whose cache lines it alone reads, and writes its b words. On a TPU neighbours lie in lanes,
and lanes do not shift: a block's fields are transposed in fast memory, so that number i of all
groups is a row, packed by shifts of whole rows, and the words are transposed back.

Letters: M numbers, G groups of 32 numbers, b bits of a number.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from .pallas_forms import LANES, power_of_two_at_most, whole_blocks
from .stochastic_fields import GROUP, fields, filled, word_of

# Rows of 128 numbers of a TPU's block, and groups of a GPU's program.
_TPU_ROWS, _GPU_GROUPS = 512, 128


def tpu_pack(
    y_M: jax.Array, random_M: jax.Array, inverse: jax.Array, *, bits: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Words and the count of numbers that are not finite, see `quantise_pack`."""
    size = y_M.shape[0]
    y_RxL, random_RxL = (filled(x, LANES).reshape(-1, LANES) for x in (y_M, random_M))
    rows = y_RxL.shape[0]
    tile = power_of_two_at_most(rows, LANES, _TPU_ROWS)
    steps, words = whole_blocks(rows, tile), LANES // GROUP * bits

    def kernel(inverse: Any, y: Any, random: Any, out: Any, invalid: Any) -> None:
        field_RxL, invalid_RxL = fields(y[...], random[...], inverse[0], bits)
        place = _places(tile, pl.program_id(0) * tile)
        # Zeros fill the stream; the rows beyond the last one are undefined.
        field_RxL = jnp.where(place < size, field_RxL, jnp.int32(0))
        invalid_RxL = jnp.where(place < size, invalid_RxL, jnp.int32(0))
        field_LxR = field_RxL.T
        packed = [
            word_of(partial(_row, field_LxR, first), word, bits)
            for first in range(0, LANES, GROUP)
            for word in range(bits)
        ]
        out[...] = jnp.concatenate(packed).T
        invalid[...] = _sum_of_rows(invalid_RxL)

    packed, invalid = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile, LANES), lambda r: (r, 0)),
            pl.BlockSpec((tile, LANES), lambda r: (r, 0)),
        ],
        out_specs=[
            pl.BlockSpec((tile, words), lambda r: (r, 0)),
            pl.BlockSpec((None, 1, LANES), lambda r: (r, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, words), jnp.int32),
            jax.ShapeDtypeStruct((steps, 1, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(inverse.reshape(1), y_RxL, random_RxL)
    return _stream(packed, size, bits), jnp.sum(invalid, dtype=jnp.int32)


def _places(rows: int, first_row: jax.Array) -> jax.Array:
    """The numbers' places in the vector, int32 [rows, 128]."""
    row = first_row + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    return row * LANES + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)


def _row(x_LxR: jax.Array, first: int, place: int) -> jax.Array:
    return x_LxR[first + place : first + place + 1]


def _sum_of_rows(x_RxL: jax.Array) -> jax.Array:
    return jnp.sum(x_RxL, axis=0, keepdims=True, dtype=jnp.int32)


def _stream(packed: jax.Array, size: int, bits: int) -> jax.Array:
    words = packed.reshape(-1)[: whole_blocks(size, GROUP) * bits]
    stream: jax.Array = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return stream


def gpu_pack(
    y_M: jax.Array, random_M: jax.Array, inverse: jax.Array, *, bits: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As `tpu_pack`."""
    size = y_M.shape[0]
    groups = whole_blocks(size, GROUP)
    steps = whole_blocks(groups, _GPU_GROUPS)

    def kernel(y: Any, random: Any, inverse: Any, out: Any, invalid: Any) -> None:
        group_G = pl.program_id(0) * _GPU_GROUPS + jnp.arange(_GPU_GROUPS, dtype=jnp.int32)
        field_IxG = []
        bad_G = jnp.zeros((_GPU_GROUPS,), jnp.int32)
        for place in range(GROUP):
            at = group_G * GROUP + place
            y_G = plgpu.load(y.at[at], mask=at < size, other=0.0)
            random_G = plgpu.load(random.at[at], mask=at < size, other=0)
            field_G, invalid_G = fields(y_G, random_G, inverse[0], bits)
            field_IxG.append(jnp.where(at < size, field_G, jnp.int32(0)))
            bad_G = bad_G + invalid_G
        for word in range(bits):
            word_G = word_of(lambda place: field_IxG[place], word, bits)
            plgpu.store(out.at[group_G * bits + word], word_G, mask=group_G < groups)
        plgpu.store(invalid.at[group_G], bad_G, mask=group_G < groups)

    packed, invalid = pl.pallas_call(
        kernel,
        grid=(steps,),
        out_shape=[
            jax.ShapeDtypeStruct((groups * bits,), jnp.int32),
            jax.ShapeDtypeStruct((groups,), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(y_M, random_M, inverse.reshape(1))
    return _stream(packed, size, bits), jnp.sum(invalid, dtype=jnp.int32)
