"""Clipping: the one place where the influence of a privacy unit on a sum is bounded.

Letters: E examples of a micro-batch, N examples held by a client, P parameters of a tree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# The float32 norm below is off by at most a relative 896 u / 2 + 10 u < 2^-15 (u = 2^-24): sums are
# taken in blocks of 128, so no partial sum has more than 128 * 7 terms behind it for trees of up to
# 2^31 elements per leaf and 2^14 leaves. Twice that is left as the margin.
_BLOCK = 128
_MARGIN = 1.0 + 2.0**-14
_TINY = float(jnp.finfo(jnp.float32).tiny)


class ClipStats(NamedTuple):
    """What a clipped sum reports beside the sum. Not noised: it must not leave the data holder.

    Attributes:
        loss: [] float32, mean loss over the examples that count (0 when there are none).
        clipped: [] float32, how many of them were scaled down or zeroed.
        weight: [] float32, how many examples count.
    """

    loss: jax.Array
    clipped: jax.Array
    weight: jax.Array


def _block_sum(x_P: jax.Array) -> jax.Array:
    """Sum of a vector with an error bound that does not grow with its length."""
    while x_P.size > 1:
        pad = -x_P.size % _BLOCK
        # The barrier keeps XLA from merging the levels into one long sequential sum, which would
        # stop growing at 2^24 equal terms and so understate the norm.
        x_P = jax.lax.optimization_barrier(
            jnp.pad(x_P, (0, pad)).reshape(-1, _BLOCK).sum(axis=1, dtype=jnp.float32)
        )
    return x_P.reshape(-1).sum()


def _powers_of_two(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """2^-k and 2^k, both normal float32, with 1 <= peak * 2^-k < 4 for a normal `peak`.

    Dividing by the peak would not do: XLA turns that into a product with the reciprocal, which is
    denormal above 2^126 and flushed to zero, and the norm of a huge tree with it.
    """
    bits = jax.lax.bitcast_convert_type(peak, jnp.uint32)
    exponent = jnp.clip(bits >> jnp.uint32(23), jnp.uint32(1), jnp.uint32(253))
    pair = ((jnp.uint32(254) - exponent) << jnp.uint32(23), exponent << jnp.uint32(23))
    shrink, grow = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in pair)
    return shrink, grow


def clip(tree: PyTree, clip_norm: float | jax.Array) -> tuple[PyTree, jax.Array]:
    """Scales a tree down to an l2 norm of at most `clip_norm` over all its leaves together.

    Formal guarantee: for every input, ||out||_2 <= clip_norm as a real number, where out is read
    as the float32 values returned. The norm is computed in float32 and taken to be larger by a
    factor of 1 + 2^-14, which exceeds its worst-case rounding error, so a clipped tree is shorter
    than `clip_norm` by up to that factor. Values are scaled by a power of two near the
    largest magnitude, so that their squares neither overflow nor vanish.

    | input                                  | output                 | norm reported |
    |----------------------------------------|------------------------|---------------|
    | all zeros, or no leaves, or no elements| unchanged              | 0             |
    | norm (with margin) <= clip_norm        | unchanged              | the norm      |
    | finite, however large                  | scaled to clip_norm    | the norm, inf above 3.4e38 |
    | any leaf holds NaN or inf              | all zeros              | inf           |
    | all magnitudes below 1.2e-38 (denormal)| all zeros              | 0             |
    | clip_norm is inf                       | unchanged              | the norm      |
    | clip_norm is zero, negative or NaN     | all zeros              | the norm      |

    Args:
        tree: pytree of real arrays of any shapes; they are read as float32.
        clip_norm: [] float32, in the unit of the tree.

    Returns:
        The clipped tree (same structure and shapes, float32) and the norm before clipping ([]).
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]
    full = [leaf for leaf in leaves if leaf.size]
    if not full:
        return jax.tree.unflatten(structure, leaves), jnp.float32(0)
    bound = jnp.asarray(clip_norm, jnp.float32)
    bound = jnp.where(bound > 0, bound, jnp.float32(0))  # NaN compares false

    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in full]).all()
    peak = jnp.stack([jnp.abs(leaf).max() for leaf in full]).max()
    normal = finite & (peak >= _TINY)
    shrink, grow = _powers_of_two(jnp.where(normal, peak, jnp.float32(1)))
    sums = [_block_sum(jnp.square(leaf * shrink).reshape(-1)) for leaf in full]
    relative = jnp.sqrt(_block_sum(jnp.stack(sums)))  # norm * shrink, between 1 and 4 sqrt(P)
    norm = jnp.where(normal, grow * relative, jnp.where(finite, jnp.float32(0), jnp.inf))

    margin = jnp.float32(_MARGIN)
    keep = (norm * margin <= bound) | jnp.isinf(bound)
    scale = bound / jnp.where(normal, relative * margin, jnp.float32(1))

    def one(leaf: jax.Array) -> jax.Array:
        scaled = jnp.where(keep, leaf, (leaf * shrink) * scale)
        return jnp.where(normal, scaled, jnp.float32(0))

    return jax.tree.unflatten(structure, [one(leaf) for leaf in leaves]), norm


def _masked_sums(
    loss_fn: LossFn,
    params: PyTree,
    examples: PyTree,
    weights_E: jax.Array,
    clip_norm: float | jax.Array,
) -> tuple[PyTree, ClipStats]:
    """As `clipped_grad_sum`, with the sum of the losses in place of their mean."""
    counts_E = jnp.asarray(weights_E).astype(jnp.float32) > 0

    def one(example: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        value, grad = jax.value_and_grad(loss_fn)(params, example)
        clipped, norm = clip(grad, clip_norm)
        return value, clipped, norm

    loss_E, grads_E, norm_E = jax.vmap(one)(examples)

    def total(leaf_E: jax.Array) -> jax.Array:
        mask = counts_E.reshape(-1, *[1] * (leaf_E.ndim - 1))
        return jnp.where(mask, leaf_E, jnp.float32(0)).sum(axis=0)

    too_long_E = norm_E * jnp.float32(_MARGIN) > jnp.asarray(clip_norm, jnp.float32)
    stats = ClipStats(
        loss=total(loss_E.astype(jnp.float32)),
        clipped=(too_long_E & counts_E).astype(jnp.float32).sum(),
        weight=counts_E.astype(jnp.float32).sum(),
    )
    return jax.tree.map(total, grads_E), stats


def _mean_loss(stats: ClipStats) -> ClipStats:
    return stats._replace(loss=stats.loss / jnp.maximum(stats.weight, jnp.float32(1)))


def clipped_grad_sum(
    loss_fn: LossFn,
    params: PyTree,
    examples: PyTree,
    weights_E: jax.Array,
    clip_norm: float | jax.Array,
) -> tuple[PyTree, ClipStats]:
    """Sum over examples of the gradient of each, clipped to `clip_norm`.

    Formal guarantee: each example that counts contributes a tree of l2 norm at most `clip_norm`
    (see `clip`) that depends on no other example, so adding or removing one example moves the sum
    by at most `clip_norm`, up to the float32 rounding of the additions themselves. It needs a
    `loss_fn` that reads nothing but its own example.

    | input                            | effect                                             |
    |----------------------------------|----------------------------------------------------|
    | weight 0                         | the example contributes exactly nothing            |
    | every weight 0                   | a sum of zeros, loss 0                             |
    | non-finite gradient of an example| contributes zeros; counted in `clipped` and `weight`|
    | non-finite loss of an example    | `loss` is non-finite; the sum is not affected      |

    Args:
        loss_fn: (params, example) -> [] loss; `example` is `examples` without its leading axis.
        params: pytree of float arrays that the gradient is taken with respect to.
        examples: pytree of [E, ...] arrays; one entry is one privacy unit.
        weights_E: [E] bool or number; entries above zero count, once, the others are padding.
        clip_norm: [] float32.

    Returns:
        The sum (float32, like `params`) and its `ClipStats`. Memory: E gradients at once.
    """
    total, stats = _masked_sums(loss_fn, params, examples, weights_E, clip_norm)
    return total, _mean_loss(stats)


def poisson_clipped_grad_sum(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    indices_N: jax.Array,
    count: jax.Array,
    clip_norm: float | jax.Array,
    microbatch: int,
) -> tuple[PyTree, ClipStats]:
    """`clipped_grad_sum` over a sampled set whose size is known only at run time.

    Takes ceil(count / microbatch) micro-batches, so memory is bounded by `microbatch` gradients
    and time follows the size of the sample; no sampled example is dropped or repeated. Under an
    outer `vmap` the loop runs to the largest count and the other rows ignore the extra turns.
    The order of summation follows from `indices_N` and `microbatch` alone.

    Formal guarantee: as `clipped_grad_sum`, for one entry of `data` more or fewer among the first
    `count` indices. Running time reveals the count: it must be kept where the data is.

    | count                 | effect                                |
    |-----------------------|---------------------------------------|
    | 0                     | zeros, without evaluating `loss_fn`   |
    | not a multiple        | the tail of the last batch is masked  |
    | above len(indices_N)  | all of `indices_N`, each once         |

    Args:
        loss_fn: as for `clipped_grad_sum`.
        params: as for `clipped_grad_sum`.
        data: pytree of [N, ...] arrays.
        indices_N: int32, the selected entries first, as `poisson_sample` returns them.
        count: [] int32, how many are selected.
        clip_norm: [] float32.
        microbatch: examples whose gradients are held at once.

    Returns:
        The sum (float32, like `params`) and its `ClipStats`.

    Raises:
        UserError: `microbatch` is below one.
    """
    if microbatch < 1:
        raise UserError(f"microbatch must be at least 1, got {microbatch}")
    count = jnp.minimum(jnp.asarray(count, jnp.int32), jnp.int32(indices_N.shape[0]))
    padded = jnp.pad(indices_N, (0, -indices_N.shape[0] % microbatch))
    positions_E = jnp.arange(microbatch, dtype=jnp.int32)
    zero = jnp.float32(0)
    start = (
        jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params),
        ClipStats(zero, zero, zero),
    )

    def body(step: jax.Array, carry: tuple[PyTree, ClipStats]) -> tuple[PyTree, ClipStats]:
        first = step * jnp.int32(microbatch)
        indices_E = jax.lax.dynamic_slice_in_dim(padded, first, microbatch)
        examples = jax.tree.map(lambda x: x[indices_E], data)
        found = _masked_sums(loss_fn, params, examples, first + positions_E < count, clip_norm)
        return jax.tree.map(jnp.add, carry, found)

    turns = (count + jnp.int32(microbatch - 1)) // jnp.int32(microbatch)
    total, stats = jax.lax.fori_loop(jnp.int32(0), turns, body, start)
    return total, _mean_loss(stats)


@dataclass(frozen=True)
class ClippedGradSum:
    """A per-example clipped gradient sum that knows its own sensitivity.

    Attributes:
        loss_fn: (params, example) -> [] loss.
        clip_norm: bound on the norm of one example's gradient.
    """

    loss_fn: LossFn
    clip_norm: float

    def __post_init__(self) -> None:
        if not 0 < self.clip_norm < math.inf:
            raise UserError(f"clip_norm must be positive and finite, got {self.clip_norm}")

    @property
    def sensitivity(self) -> float:
        """Largest l2 change of the sum when one example is added or removed."""
        return self.clip_norm

    def over(
        self, params: PyTree, examples: PyTree, weights_E: jax.Array
    ) -> tuple[PyTree, ClipStats]:
        """`clipped_grad_sum` over examples at hand."""
        return clipped_grad_sum(self.loss_fn, params, examples, weights_E, self.clip_norm)

    def over_sample(
        self, params: PyTree, data: PyTree, indices_N: jax.Array, count: jax.Array, microbatch: int
    ) -> tuple[PyTree, ClipStats]:
        """`poisson_clipped_grad_sum` over a sampled set."""
        return poisson_clipped_grad_sum(
            self.loss_fn, params, data, indices_N, count, self.clip_norm, microbatch
        )
