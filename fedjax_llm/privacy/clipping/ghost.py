"""Clipped sums from the norms of per-example gradients, which are never held (ghost clipping).

Li et al., arXiv 2110.05679, section 4, and arXiv 2009.03106 for the two backward passes; here for
LoRA's factors, through `fedjax_llm_kernels.metered`.

When it pays. A backward pass more is what it costs, and all per-example gradients but one factor's
in one layer is what it saves. Of LoRA those are R (D + F) numbers an example and projection, where
the activations that stay in memory anyway are T (D + F) or more: with sequences of T much longer
than the rank R there is nothing to save, and "vmap" is the default. Over "vmap", measured on a CPU
with a model of 15 million parameters, 288 wide, LoRA on all linear projections
(experiments/benchmarks/privacy.py):

| setting | kind | time | memory |
|---|---|---|---|
| rank 8, 16 examples of 128 tokens | joint | 1.29 x | 1.06 x |
| | per factor | 1.49 x | |
| | per layer, which needs no second pass | 1.04 x | |
| rank 64, 64 examples of 16 tokens | joint | 0.69 x | 0.28 x |

Letters: E examples, L layers, n factors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm_kernels.clip_norm import MARGIN, clip_arrays
from fedjax_llm_kernels.lockstep import in_step
from fedjax_llm_kernels.metered import Metered, NotAPlainFactor

from .kinds import Bound, Clip, PerFactor, PerLayer

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# The second pass repeats the first with scaled cotangents, and rounds otherwise. With this much
# room, what is found too long in float32 is only what the backward pass amplifies a thousandfold
# and more.
_ROOM = 1.0 + 2.0**-10
# Who is found too long is shortened by what was found, and by this for another rounding, as passes
# in bfloat16 often need it; who is still too long after so many times counts for nothing.
_SHORTER = 1.0 - 2.0**-7
_TIMES = 8


class GhostSums(NamedTuple):
    """What the sum and its statistics are made of.

    Attributes:
        total: clipped sum, float32, like `params`.
        loss_E: of each example, as the loss returns it.
        shortened_E: bool, which were shortened or zeroed.
    """

    total: PyTree
    loss_E: jax.Array
    shortened_E: jax.Array


def ghost_sums(
    loss_fn: LossFn, params: PyTree, examples: PyTree, counts_E: jax.Array, kind: Clip
) -> GhostSums:
    """The clipped sum by method "ghost"; see `clipped_grad_sum` for what is guaranteed.

    One forward pass. For `PerLayer` one backward pass, in which each factor's part of each layer is
    shortened where it arises. For the other kinds one that finds all norms, and one more for each
    group (`Joint` one, `PerFactor` two) with the loss of example e weighted by
    min(1, bound / norm_e), and 0 for examples that do not count or have no finite norm. The second
    one measures as well what it adds. Whoever is found too long in it, by rounding that the
    backward pass amplified, gets a lower weight, after some times 0, and the pass is repeated until
    nobody is: that follows from the example alone.

    Args:
        loss_fn: must hand each factor, as it is, to `low_rank_matmul`, and for `PerLayer` once in
            each layer.
        params: {name: {"a" or "b": [..., inputs, outputs] float}}.
        examples: pytree of [E, ...] arrays.
        counts_E: bool.
        kind: of clipping.

    Raises:
        UserError: a leaf is no plain factor, or the loss computes something else from it.
    """
    sides = _plain_sides(params)
    leaves, structure = jax.tree.flatten(params)
    count = counts_E.shape[0]

    def losses(values: list[jax.Array], caps_E: list[jax.Array]) -> jax.Array:
        def one(caps: list[jax.Array], example: PyTree) -> jax.Array:
            metered = [Metered(value, cap) for value, cap in zip(values, caps, strict=True)]
            return loss_fn(jax.tree.unflatten(structure, metered), example)

        return jax.vmap(one)(caps_E, examples)

    def passes(caps_E: list[jax.Array]) -> tuple[jax.Array, Callable[..., Any]]:
        try:
            return jax.vjp(losses, leaves, caps_E)
        except NotAPlainFactor as error:
            raise UserError(f'{error}; use method "vmap"') from error

    if isinstance(kind, PerLayer):
        bounds_L = kind.bounds_L(params)
        caps_E = []
        for leaf in leaves:
            if leaf.ndim != 3:
                raise UserError(
                    'per-layer clipping by method "ghost" needs factors [layers, inputs, outputs], '
                    f'got {leaf.shape}; use method "vmap"'
                )
            caps_E.append(jnp.where(counts_E[:, None], bounds_L[None, :], jnp.float32(0)))
        loss_E, pull = passes(caps_E)
        total, norms_E = pull(jnp.ones_like(loss_E))
        too_long = [norm * jnp.float32(MARGIN) > bounds_L[None, :] for norm in norms_E]
        shortened_E = jnp.stack([wide.any(axis=1) for wide in too_long]).any(axis=0)
        return GhostSums(_float32(jax.tree.unflatten(structure, total)), loss_E, shortened_E)

    unlimited_E = [jnp.full((count, *leaf.shape[:-2]), jnp.inf, jnp.float32) for leaf in leaves]
    loss_E, pull = passes(unlimited_E)
    _, norms_E = pull(jnp.ones_like(loss_E))
    total = list(leaves)
    shortened_E = jnp.zeros((count,), bool)
    for places, bound in _groups(kind, sides):
        weights_E, short_E = _weights(_norms_of(norms_E, places), bound, counts_E)
        found = _weighted(pull, loss_E, weights_E, bound, places)
        for place, leaf in zip(places, found, strict=True):
            total[place] = leaf
        shortened_E |= short_E
    return GhostSums(_float32(jax.tree.unflatten(structure, total)), loss_E, shortened_E)


def _weights(norm_E: jax.Array, bound: Bound, counts_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each example's loss is multiplied by, and whether that shortens it."""
    bound = _positive(bound)
    reach_E = norm_E * jnp.float32(MARGIN * _ROOM)
    finite_E = jnp.isfinite(reach_E)
    keep_E = finite_E & ((reach_E <= bound) | jnp.isinf(bound))
    scale_E = bound / jnp.where(keep_E | ~finite_E, jnp.float32(1), reach_E)
    weights_E = jnp.where(keep_E, jnp.float32(1), jnp.where(finite_E, scale_E, jnp.float32(0)))
    return jnp.where(counts_E, weights_E, jnp.float32(0)), ~keep_E


def _weighted(
    pull: Callable[..., Any],
    loss_E: jax.Array,
    weights_E: jax.Array,
    bound: Bound,
    places: list[int],
) -> list[jax.Array]:
    """The group's leaves of the weighted sum, in which nobody is longer than the bound."""
    bound = _positive(bound)
    shapes = jax.eval_shape(pull, loss_E)[0]
    State = tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]

    def attempt(state: State) -> State:
        weights_E, _, _, times = state
        leaves, norms_E = pull(weights_E.astype(loss_E.dtype))
        norm_E = _norms_of(norms_E, places)
        # Of weight zero is nothing left, even where zero times infinity made NaN: those are zeroed.
        reach_E = norm_E * jnp.float32(MARGIN)
        finite_E = jnp.isfinite(reach_E)
        over_E = ~((reach_E <= bound) & finite_E) & (weights_E > 0)
        shorter_E = weights_E * (bound / reach_E) * jnp.float32(_SHORTER)
        shorter_E = jnp.where(finite_E & (times < _TIMES), shorter_E, jnp.float32(0))
        weights_E = jnp.where(over_E, shorter_E, weights_E)
        again = in_step(over_E.any().astype(jnp.int32)) > 0
        return weights_E, [leaves[place] for place in places], again, times + jnp.int32(1)

    start = [jnp.zeros(shapes[place].shape, shapes[place].dtype) for place in places]
    # After some turns each but the last takes a weight away, so that it ends. One more than needed,
    # beside a device that needs it, finds the same again.
    state: State = (weights_E, start, jnp.bool_(True), jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[2], attempt, state)[1]


def _norms_of(norms_E: list[jax.Array], places: list[int]) -> jax.Array:
    """[E]: the norm over all layers of the group's leaves; inf where one is not finite."""
    if not places:
        return jnp.zeros((norms_E[0].shape[0],), jnp.float32)
    group = [norms_E[place] for place in places]
    return jax.vmap(lambda norms: clip_arrays(norms, jnp.float32(jnp.inf))[1])(group)


def _groups(kind: Clip, sides: list[str]) -> list[tuple[list[int], Bound]]:
    """Places of the leaves that share a norm, and that norm."""
    if isinstance(kind, PerFactor):
        bounds = {"a": kind.clip_norm_a, "b": kind.clip_norm_b}
        found = [
            ([place for place, at in enumerate(sides) if at == side], bound)
            for side, bound in bounds.items()
        ]
        return [(places, bound) for places, bound in found if places]
    assert not isinstance(kind, PerLayer)
    return [(list(range(len(sides))), kind.clip_norm)]


def _plain_sides(params: PyTree) -> list[str]:
    """The side, "a" or "b", of each leaf."""
    sides = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        side = str(getattr(path[-1], "key", "")) if path else ""
        if side not in ("a", "b") or jnp.ndim(leaf) < 2:
            raise UserError(
                f'method "ghost" needs plain low-rank factors under "a" and "b", and '
                f'{jax.tree_util.keystr(path) or "the tree"} is none; use method "vmap"'
            )
        sides.append(side)
    if not sides or not isinstance(params, Mapping):
        raise UserError('method "ghost" needs low-rank factors to train; use method "vmap"')
    return sides


def _positive(bound: Bound) -> jax.Array:
    bound = jnp.asarray(bound, jnp.float32)
    return jnp.where(bound > 0, bound, jnp.float32(0))  # NaN compares false


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
