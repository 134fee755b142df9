"""Sums of per-example gradients, each clipped: the influence of an example on a step is bounded.

Letters: E examples of a micro-batch, N examples held by a client.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm_kernels.lockstep import turns_together

from .ghost import ghost_sums
from .kinds import Clip, Joint, as_clip
from .norm import counted_sum

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]
Method = Literal["vmap", "ghost"]


class ClipStats(NamedTuple):
    """What a clipped sum reports beside the sum. Not noised: it must not leave the data holder.

    Attributes:
        loss: [] float32, mean loss over the examples that count (0 when there are none).
        clipped: [] float32, how many of them were scaled down or zeroed, in any group of the kind.
        weight: [] float32, how many examples count.
    """

    loss: jax.Array
    clipped: jax.Array
    weight: jax.Array


def _masked_sums(
    loss_fn: LossFn,
    params: PyTree,
    examples: PyTree,
    weights_E: jax.Array,
    kind: Clip,
    method: Method,
) -> tuple[PyTree, ClipStats]:
    """As `clipped_grad_sum`, with the sum of the losses in place of their mean."""
    counts_E = jnp.asarray(weights_E).astype(jnp.float32) > 0

    if method == "ghost":
        summed, loss_E, shortened_E = ghost_sums(loss_fn, params, examples, counts_E, kind)
    else:
        one = jax.value_and_grad(loss_fn)
        loss_E, grads_E = jax.vmap(one, in_axes=(None, 0))(params, examples)
        summed, shortened_E = kind.clip_sum(grads_E, counts_E)

    stats = ClipStats(
        loss=counted_sum(loss_E.astype(jnp.float32), counts_E),
        clipped=(shortened_E & counts_E).astype(jnp.float32).sum(),
        weight=counts_E.astype(jnp.float32).sum(),
    )
    return summed, stats


def _mean_loss(stats: ClipStats) -> ClipStats:
    return stats._replace(loss=stats.loss / jnp.maximum(stats.weight, jnp.float32(1)))


def _check_method(method: str) -> None:
    if method not in get_args(Method):
        raise UserError(f"method must be one of {', '.join(get_args(Method))}; got {method}")


def clipped_grad_sum(
    loss_fn: LossFn,
    params: PyTree,
    examples: PyTree,
    weights_E: jax.Array,
    clip_norm: float | jax.Array | Clip,
    method: Method = "vmap",
) -> tuple[PyTree, ClipStats]:
    """Sum over examples of the gradient of each, clipped.

    Formal guarantee: each example that counts contributes a tree of l2 norm at most the clip's
    `sensitivity`, and within each group of the kind at most that group's bound, that depends on no
    other example. So adding or removing one example moves the sum by at most `sensitivity`, up to
    the float32 rounding of the additions themselves. It needs a `loss_fn` that reads nothing but
    its own example. What "contributes a tree" means:

    - "vmap": the clipped float32 gradients, which are then added (see `clip`).
    - "ghost": what the weighted backward pass adds in each low-rank product, measured in that pass
      (see `ghost_sums`): the float32 outer products of each example, or, with fewer positions than
      the rank, the exact products of the float32 activations and cotangents (see
      `clipped_outer_sum` for their rounding). It needs a `loss_fn` that uses the factors in
      `low_rank_matmul` alone; a factor used more than once is bounded by the triangle inequality,
      or, for `PerLayer`, not: there it must be used once.

    The methods agree up to rounding, and where an example is shortened up to a relative 2^-10, in
    bfloat16 up to some 2^-6: "ghost" shortens once more who is found too long after rounding.

    | input                            | effect                                             |
    |----------------------------------|----------------------------------------------------|
    | weight 0                         | the example contributes exactly nothing            |
    | every weight 0                   | a sum of zeros, loss 0                             |
    | non-finite gradient of an example| contributes zeros (in the groups that hold it); \
counted in `clipped` and `weight`|
    | norm above 2^126 bounds, or 3.4e38 | "vmap": scaled; "ghost": contributes zeros       |
    | non-finite loss of an example    | `loss` is non-finite; the sum is not affected      |

    Args:
        loss_fn: (params, example) -> [] loss; `example` is `examples` without its leading axis.
        params: pytree of float arrays that the gradient is taken with respect to.
        examples: pytree of [E, ...] arrays; one entry is one privacy unit.
        weights_E: [E] bool or number; entries above zero count, once, the others are padding.
        clip_norm: `Joint`, `PerFactor` or `PerLayer`; a float32 scalar means `Joint`.
        method: "vmap" takes any loss and any tree and is the faster where sequences are long
            against the rank; elsewhere "ghost" saves memory and time (see `clipping.ghost`).

    Returns:
        The sum (float32, like `params`) and its `ClipStats`. Memory: E gradients at once, or with
        "ghost" E outer products of one factor of one layer.

    Raises:
        UserError: the kind does not fit the tree; "ghost" does not fit tree or loss.
    """
    _check_method(method)
    kind = as_clip(clip_norm)
    total, stats = _masked_sums(loss_fn, params, examples, weights_E, kind, method)
    return total, _mean_loss(stats)


def poisson_clipped_grad_sum(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    indices_N: jax.Array,
    count: jax.Array,
    clip_norm: float | jax.Array | Clip,
    microbatch: int,
    method: Method = "vmap",
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
        clip_norm: as for `clipped_grad_sum`.
        microbatch: examples whose gradients are held at once.
        method: as for `clipped_grad_sum`.

    Returns:
        The sum (float32, like `params`) and its `ClipStats`.

    Raises:
        UserError: `microbatch` is below one; as for `clipped_grad_sum`.
    """
    _check_method(method)
    if microbatch < 1:
        raise UserError(f"microbatch must be at least 1, got {microbatch}")
    kind = as_clip(clip_norm)
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
        counts_E = first + positions_E < count
        found = _masked_sums(loss_fn, params, examples, counts_E, kind, method)
        return jax.tree.map(jnp.add, carry, found)

    turns = (count + jnp.int32(microbatch - 1)) // jnp.int32(microbatch)
    total, stats = turns_together(turns, body, start)
    return total, _mean_loss(stats)


@dataclass(frozen=True)
class ClippedGradSum:
    """A per-example clipped gradient sum that knows its own sensitivity.

    Attributes:
        loss_fn: (params, example) -> [] loss.
        clip_norm: a kind of clipping; a number means `Joint`.
        method: how the sum is computed; the guarantee is the same.
    """

    loss_fn: LossFn
    clip_norm: float | Clip
    method: Method = "vmap"

    def __post_init__(self) -> None:
        _check_method(self.method)
        self._kind()

    def _kind(self) -> Clip:
        # As a number, so that one that is not positive and finite is an error here.
        return Joint(self.clip_norm) if isinstance(self.clip_norm, int | float) else self.clip_norm

    @property
    def sensitivity(self) -> float | jax.Array:
        """Largest l2 change of the sum when one example is added or removed."""
        return self._kind().sensitivity

    def over(
        self, params: PyTree, examples: PyTree, weights_E: jax.Array
    ) -> tuple[PyTree, ClipStats]:
        """`clipped_grad_sum` over examples at hand."""
        return clipped_grad_sum(
            self.loss_fn, params, examples, weights_E, self._kind(), self.method
        )

    def over_sample(
        self, params: PyTree, data: PyTree, indices_N: jax.Array, count: jax.Array, microbatch: int
    ) -> tuple[PyTree, ClipStats]:
        """`poisson_clipped_grad_sum` over a sampled set."""
        return poisson_clipped_grad_sum(
            self.loss_fn, params, data, indices_N, count, self._kind(), microbatch, self.method
        )
