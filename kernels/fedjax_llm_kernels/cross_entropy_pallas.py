"""The pass over the vocabulary of `cross_entropy`, as Pallas kernels.

For each row of `hidden` its log-sum-exp over all words and, if wanted, the softmax-weighted mean of
the unembedding rows. A tile of logits lives in fast memory and is gone when the next one comes.

On a TPU programs go over rows by words, the words innermost and in turn, and a block of rows keeps
its maximum, sum and mean in fast memory. On a GPU a program takes a block of rows and walks the
words; the mean is too large for its registers and stays in the output, which that program alone
reads and writes, tile by tile of the width, through the cache. No sum is made by several programs
at once: the same input gives the same bits.

Letters: N rows, V words, D width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from .pallas_forms import TPU_BYTES, power_of_two_at_most, whole_blocks

# Finite, so that exp(max - new_max) is 0 and not NaN at the first tile.
_LEAST = float(jnp.finfo(jnp.float32).min)
# Tiles of the GPU form: rows, words, and columns of the width.
_GPU_N, _GPU_V, _GPU_D = 64, 64, 64


def tpu_tiles(rows: int, vocabulary: int, width: int, itemsize: int) -> tuple[int, int]:
    """Rows and words of a tile, such that all buffers fit into a TPU core's fast memory.

    Raises:
      ValueError: Not even the smallest tiles fit.

    >>> tpu_tiles(1024, 49152, 576, 2), tpu_tiles(1024, 128256, 4096, 2)
    ((256, 1024), (128, 128))
    """
    lanes = whole_blocks(width, 128) * 128
    tile_n = power_of_two_at_most(rows, 16, 256)
    tile_v = power_of_two_at_most(vocabulary, 128, 1024)
    while (needed := _tpu_bytes(tile_n, tile_v, lanes, itemsize)) > TPU_BYTES:
        if tile_v > tile_n and tile_v > 128:
            tile_v //= 2
        elif tile_n > 16:
            tile_n //= 2
        elif tile_v > 128:
            tile_v //= 2
        else:
            raise ValueError(
                f"the Pallas cross entropy needs {needed} bytes of fast memory at width {width} "
                f'and has {TPU_BYTES}; use implementation "xla"'
            )
    return tile_n, tile_v


def _tpu_bytes(tile_n: int, tile_v: int, lanes: int, itemsize: int) -> int:
    inputs = 2 * (tile_n + tile_v) * lanes * itemsize  # two buffers each
    mean = 3 * tile_n * lanes * 4  # the running one, and two buffers to write
    logits = 2 * tile_n * tile_v * 4  # and their exponentials
    return inputs + mean + logits + 4 * tile_n * 128 * 4


def tpu_pass(
    hidden_NxD: jax.Array, unembed_VxD: jax.Array, *, with_gradient: bool, interpret: bool
) -> list[jax.Array]:
    """Log-sum-exp [N, 1] float32 and, if asked, the weighted mean [N, D] float32."""
    rows, width = hidden_NxD.shape
    vocabulary = unembed_VxD.shape[0]
    tile_n, tile_v = tpu_tiles(rows, vocabulary, width, hidden_NxD.dtype.itemsize)
    scratch = [pltpu.VMEM((tile_n, 1), jnp.float32), pltpu.VMEM((tile_n, 1), jnp.float32)]
    out_specs = [pl.BlockSpec((tile_n, 1), lambda n, v: (n, 0))]
    out_shape = [jax.ShapeDtypeStruct((rows, 1), jnp.float32)]
    if with_gradient:
        scratch.append(pltpu.VMEM((tile_n, width), jnp.float32))
        out_specs.append(pl.BlockSpec((tile_n, width), lambda n, v: (n, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, width), jnp.float32))
    steps = whole_blocks(vocabulary, tile_v)
    found: list[jax.Array] = pl.pallas_call(
        partial(_tpu_kernel, vocabulary, steps, with_gradient),
        grid=(whole_blocks(rows, tile_n), steps),
        in_specs=[
            pl.BlockSpec((tile_n, width), lambda n, v: (n, 0)),
            pl.BlockSpec((tile_v, width), lambda n, v: (v, 0)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(hidden_NxD, unembed_VxD)
    return found


def _tpu_kernel(vocabulary: int, steps: int, with_gradient: bool, *refs: Any) -> None:
    if with_gradient:
        hidden, unembed, lse, mean_out, max_ref, sum_ref, mean_ref = refs
    else:
        hidden, unembed, lse, max_ref, sum_ref = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        max_ref[...] = jnp.full(max_ref.shape, _LEAST, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        if with_gradient:
            mean_ref[...] = jnp.zeros(mean_ref.shape, jnp.float32)

    unembed_CxD = unembed[...]
    first = step * unembed_CxD.shape[0]
    if vocabulary % unembed_CxD.shape[0]:
        # What lies beyond the last word is undefined: it may be NaN, which times 0 stays NaN.
        word = first + jax.lax.broadcasted_iota(jnp.int32, unembed_CxD.shape, 0)
        unembed_CxD = jnp.where(word < vocabulary, unembed_CxD, jnp.zeros_like(unembed_CxD))
    logits_NxC = _dot(hidden[...], unembed_CxD, ((1,), (1,)))
    max_N, sum_N, shrink_N, weights_NxC = _absorb(
        max_ref[...], sum_ref[...], logits_NxC, first, vocabulary
    )
    max_ref[...], sum_ref[...] = max_N, sum_N
    if with_gradient:
        mean_ref[...] = mean_ref[...] * shrink_N + _dot(
            weights_NxC.astype(unembed_CxD.dtype), unembed_CxD, ((1,), (0,))
        )

    @pl.when(step == steps - 1)
    def _() -> None:
        lse[...] = max_ref[...] + jnp.log(sum_ref[...])
        if with_gradient:
            mean_out[...] = mean_ref[...] / sum_ref[...]


def _absorb(
    max_N: jax.Array, sum_N: jax.Array, logits_NxC: jax.Array, first: jax.Array, vocabulary: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The running maximum and sum [N, 1] after a tile; what was shrinks by; the tile's weights."""
    if vocabulary % logits_NxC.shape[1]:
        word = first + jax.lax.broadcasted_iota(jnp.int32, logits_NxC.shape, 1)
        logits_NxC = jnp.where(word < vocabulary, logits_NxC, jnp.float32(_LEAST))
    new_max_N = jnp.maximum(max_N, jnp.max(logits_NxC, axis=1, keepdims=True))
    weights_NxC = jnp.exp(logits_NxC - new_max_N)
    shrink_N = jnp.exp(max_N - new_max_N)
    sum_N = sum_N * shrink_N + jnp.sum(weights_NxC, axis=1, keepdims=True)
    return new_max_N, sum_N, shrink_N, weights_NxC


def gpu_pass(
    hidden_NxD: jax.Array, unembed_VxD: jax.Array, *, with_gradient: bool, interpret: bool
) -> list[jax.Array]:
    """As `tpu_pass`."""
    rows, width = hidden_NxD.shape
    out_shape = [jax.ShapeDtypeStruct((rows, 1), jnp.float32)]
    if with_gradient:
        out_shape.append(jax.ShapeDtypeStruct((rows, width), jnp.float32))
    found: list[jax.Array] = pl.pallas_call(
        partial(_gpu_kernel, rows, unembed_VxD.shape[0], width, with_gradient, interpret),
        grid=(whole_blocks(rows, _GPU_N),),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(hidden_NxD, unembed_VxD)
    return found


def _gpu_kernel(
    rows: int, vocabulary: int, width: int, with_gradient: bool, interpret: bool, *refs: Any
) -> None:
    hidden, unembed, lse, *means = refs
    row_N = pl.program_id(0) * _GPU_N + jnp.arange(_GPU_N, dtype=jnp.int32)[:, None]
    columns = whole_blocks(width, _GPU_D)

    def column_D(step: jax.Array) -> jax.Array:
        return step * _GPU_D + jnp.arange(_GPU_D, dtype=jnp.int32)[None, :]

    def tile(ref: Any, place: jax.Array, limit: int, step: jax.Array) -> jax.Array:
        column = column_D(step)
        within = (place < limit) & (column < width)
        return plgpu.load(ref.at[place, column], mask=within, other=0.0)

    if with_gradient:

        def clear(step: jax.Array, _: None) -> None:
            column = column_D(step)
            within = (row_N < rows) & (column < width)
            zeros = jnp.zeros((_GPU_N, _GPU_D), jnp.float32)
            plgpu.store(means[0].at[row_N, column], zeros, mask=within)

        jax.lax.fori_loop(0, columns, clear, None)

    def words(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        max_N, sum_N = carry
        first = turn * _GPU_V
        word_C = first + jnp.arange(_GPU_V, dtype=jnp.int32)[:, None]

        def logits(step: jax.Array, found: jax.Array) -> jax.Array:
            one, other = tile(hidden, row_N, rows, step), tile(unembed, word_C, vocabulary, step)
            return found + _dot(one, other, ((1,), (1,)))

        logits_NxC = jax.lax.fori_loop(0, columns, logits, jnp.zeros((_GPU_N, _GPU_V), jnp.float32))
        max_N, sum_N, shrink_N, weights_NxC = _absorb(max_N, sum_N, logits_NxC, first, vocabulary)
        if with_gradient:
            _add_to_mean(means[0], shrink_N, weights_NxC, word_C)
        return max_N, sum_N

    def _add_to_mean(
        mean: Any, shrink_N: jax.Array, weights_NxC: jax.Array, word_C: jax.Array
    ) -> None:
        def add(step: jax.Array, _: None) -> None:
            column = column_D(step)
            within = (row_N < rows) & (column < width)
            unembed_CxD = tile(unembed, word_C, vocabulary, step)
            added = _dot(weights_NxC.astype(unembed_CxD.dtype), unembed_CxD, ((1,), (0,)))
            place = mean.at[row_N, column]
            before = plgpu.load(place, mask=within, other=0.0)
            plgpu.store(place, before * shrink_N + added, mask=within)

        jax.lax.fori_loop(0, columns, add, None)
        if not interpret:
            # What one thread wrote another may read in the next turn. The interpreter has no
            # threads and no such instruction.
            plgpu.debug_barrier()

    start = jnp.full((_GPU_N, 1), _LEAST, jnp.float32), jnp.zeros((_GPU_N, 1), jnp.float32)
    max_N, sum_N = jax.lax.fori_loop(0, whole_blocks(vocabulary, _GPU_V), words, start)
    lse_N = max_N + jnp.log(sum_N)
    plgpu.store(lse.at[row_N, jnp.zeros_like(row_N)], lse_N, mask=row_N < rows)
    if with_gradient:

        def divide(step: jax.Array, _: None) -> None:
            column = column_D(step)
            within = (row_N < rows) & (column < width)
            place = means[0].at[row_N, column]
            total = plgpu.load(place, mask=within, other=0.0)
            plgpu.store(place, total / sum_N, mask=within)

        jax.lax.fori_loop(0, columns, divide, None)


def _dot(
    one: jax.Array, other: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]
) -> jax.Array:
    # The platform's own precision, as in the XLA form.
    return jax.lax.dot_general(one, other, (axes, ((), ())), preferred_element_type=jnp.float32)
