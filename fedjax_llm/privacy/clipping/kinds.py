"""Ways to clip a tree, each of which knows how far it lets one unit move a sum.

A kind parts the coordinates of a tree into groups and bounds the l2 norm of each. As the groups are
disjoint, the squared norms add: the sensitivity is the root of the sum of the squared bounds.

| kind | groups | sensitivity |
|---|---|---|
| `Joint(C)` | all coordinates | C |
| `PerFactor(C_a, C_b)` | all A factors; all B factors | sqrt(C_a^2 + C_b^2) |
| `PerLayer((C_1, ..., C_L))` | each leaf in each layer; layer l's n leaves C_l / sqrt(n) each | \
sqrt(C_1^2 + ... + C_L^2) |

Letters: L layers, n leaves of a tree.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm_kernels.clip_norm import MARGIN
from fedjax_llm_kernels.clip_sum import clip_sum

from .norm import clip, counted_sum

PyTree = Any
Bound = float | jax.Array


def _check(name: str, bound: Bound) -> None:
    # The value of a traced bound is not known; `clip` makes zeros of what is not positive.
    if isinstance(bound, numbers.Real) and not 0 < bound < math.inf:
        raise UserError(f"{name} must be positive and finite, got {bound}")


def _root_of_squares(bounds: list[Bound]) -> Bound:
    if all(isinstance(bound, numbers.Real) for bound in bounds):
        return math.hypot(*(float(bound) for bound in bounds))
    return jnp.sqrt(sum(jnp.square(jnp.asarray(bound, jnp.float32)) for bound in bounds))


def _float32(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]


def _shortened(norm: jax.Array, bound: Bound) -> jax.Array:
    return norm * jnp.float32(MARGIN) > jnp.asarray(bound, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joint:
    """One l2 norm over all leaves together (arXiv 1607.00133); what a plain number means.

    Formal guarantee: `clip` returns a tree of norm at most `clip_norm` (see `clipping.clip`).

    Attributes:
        clip_norm: in the unit of the tree; a number, or a traced float32 scalar.

    Raises:
        UserError: `clip_norm` is a number that is not positive and finite.
    """

    clip_norm: Bound

    def __post_init__(self) -> None:
        _check("clip_norm", self.clip_norm)

    @property
    def sensitivity(self) -> Bound:
        """Largest l2 change of a sum of clipped trees when one is added or removed."""
        return self.clip_norm

    def clip(self, tree: PyTree) -> tuple[PyTree, jax.Array]:
        """The clipped tree (float32) and whether it was shortened or zeroed ([] bool)."""
        clipped, norm = clip(tree, self.clip_norm)
        return clipped, _shortened(norm, self.clip_norm)

    def clip_sum(self, trees_E: PyTree, counts_E: jax.Array) -> tuple[PyTree, jax.Array]:
        """The sum of the clipped trees that count, and which were shortened (bool [E]).

        Formal guarantee: that of `clip`, for each of them (see `clip_sum` of the kernels).
        """
        leaves_E, structure = jax.tree.flatten(trees_E)
        summed, norm_E = clip_sum(_float32(leaves_E), counts_E, self.clip_norm)
        return jax.tree.unflatten(structure, summed), _shortened(norm_E, self.clip_norm)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerFactor:
    """The A factors and the B factors of LoRA, each clipped to a norm of their own.

    The gradients of A and B differ in length by as much as B and A do: B starts at zero, so that
    under one joint norm the gradient of A drowns for many steps.

    Formal guarantee: `clip` returns a tree whose leaves "a" have a joint norm of at most
    `clip_norm_a` and whose leaves "b" of at most `clip_norm_b`, hence a norm of at most
    `sensitivity` in all. Both count also where only one side is there. A non-finite value zeroes
    its own side; the other keeps its bound.

    Attributes:
        clip_norm_a: for all leaves under the key "a"; a number or a traced float32 scalar.
        clip_norm_b: for all leaves under the key "b".

    Raises:
        UserError: a norm is a number that is not positive and finite; when clipping, a leaf is
            neither under "a" nor under "b".
    """

    clip_norm_a: Bound
    clip_norm_b: Bound

    def __post_init__(self) -> None:
        _check("clip_norm_a", self.clip_norm_a)
        _check("clip_norm_b", self.clip_norm_b)

    @property
    def sensitivity(self) -> Bound:
        """Largest l2 change of a sum of clipped trees when one is added or removed."""
        return _root_of_squares([self.clip_norm_a, self.clip_norm_b])

    def clip(self, tree: PyTree) -> tuple[PyTree, jax.Array]:
        """The clipped tree (float32) and whether either side was shortened or zeroed ([] bool)."""
        leaves, structure = jax.tree.flatten(tree)
        sides = leaf_sides(tree)
        clipped = list(leaves)
        shortened = jnp.bool_(False)
        for side, bound in (("a", self.clip_norm_a), ("b", self.clip_norm_b)):
            places = [place for place, found in enumerate(sides) if found == side]
            short, norm = clip([leaves[place] for place in places], bound)
            for place, leaf in zip(places, short, strict=True):
                clipped[place] = leaf
            shortened |= _shortened(norm, bound)
        return jax.tree.unflatten(structure, clipped), shortened

    def clip_sum(self, trees_E: PyTree, counts_E: jax.Array) -> tuple[PyTree, jax.Array]:
        """The sum of the clipped trees that count, and which were shortened (bool [E]).

        Formal guarantee: that of `clip`, for each of them (see `clip_sum` of the kernels).
        """
        leaves_E, structure = jax.tree.flatten(trees_E)
        leaves_E, sides = _float32(leaves_E), leaf_sides(trees_E)
        summed, shortened_E = list(leaves_E), jnp.zeros(counts_E.shape, bool)
        for side, bound in (("a", self.clip_norm_a), ("b", self.clip_norm_b)):
            places = [place for place, found in enumerate(sides) if found == side]
            sums, norm_E = clip_sum([leaves_E[place] for place in places], counts_E, bound)
            for place, leaf in zip(places, sums, strict=True):
                summed[place] = leaf
            shortened_E |= _shortened(norm_E, bound)
        return jax.tree.unflatten(structure, summed), shortened_E


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerLayer:
    """Every leaf in every layer has its own norm (arXiv 2212.01539, section 3).

    A layer is an entry of the leading axis, which all leaves share. The n leaves of layer l are
    clipped to C_l / sqrt(n) each, so that the layer as a whole stays within C_l. What one layer
    gets does not depend on another: the gradient can be clipped while it is computed.

    Formal guarantee: `clip` returns a tree whose entries [l] have a joint norm of at most C_l,
    hence a norm of at most `sensitivity` in all. A non-finite value zeroes its leaf in its layer;
    the others keep their bounds.

    Attributes:
        clip_norms: C_l, a number or a traced float32 scalar for each of the L layers.

    Raises:
        UserError: no norms, or one is a number that is not positive and finite; when clipping, the
            leading axis of a leaf is not L.
    """

    clip_norms: tuple[Bound, ...]

    def __post_init__(self) -> None:
        if not self.clip_norms:
            raise UserError("clip_norms is empty; give one for each layer")
        for number, bound in enumerate(self.clip_norms):
            _check(f"clip_norms[{number}]", bound)

    @classmethod
    def even(cls, clip_norm: float, layers: int) -> "PerLayer":
        """The same norm for each layer, of sensitivity `clip_norm` in all."""
        if layers < 1:
            raise UserError(f"layers must be at least 1, got {layers}")
        return cls((clip_norm / math.sqrt(layers),) * layers)

    @property
    def sensitivity(self) -> Bound:
        """Largest l2 change of a sum of clipped trees when one is added or removed."""
        return _root_of_squares(list(self.clip_norms))

    def bounds_L(self, tree: PyTree) -> jax.Array:
        """C_l / sqrt(n), float32 [L]: what each leaf of the tree is clipped to in each layer."""
        leaves = jax.tree.leaves(tree)
        layers = len(self.clip_norms)
        for leaf in leaves:
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != layers:
                raise UserError(
                    f"per-layer clipping has {layers} norms and a leaf of shape "
                    f"{jnp.shape(leaf)}; every leaf needs one entry for each layer"
                )
        # Two roundings, 2^-23 of the bound, for which the margin of `clip` has room.
        share = jnp.float32(1 / math.sqrt(max(len(leaves), 1)))
        return jnp.stack([jnp.asarray(bound, jnp.float32) for bound in self.clip_norms]) * share

    def clip(self, tree: PyTree) -> tuple[PyTree, jax.Array]:
        """The clipped tree (float32) and whether anything was shortened or zeroed ([] bool)."""
        bounds_L = self.bounds_L(tree)
        shortened = jnp.bool_(False)

        def one(leaf_L: jax.Array) -> jax.Array:
            nonlocal shortened
            clipped_L, norm_L = jax.vmap(clip)(leaf_L, bounds_L)
            shortened |= _shortened(norm_L, bounds_L).any()
            return clipped_L

        return jax.tree.map(one, tree), shortened

    def clip_sum(self, trees_E: PyTree, counts_E: jax.Array) -> tuple[PyTree, jax.Array]:
        """The sum of the clipped trees that count, and which were shortened (bool [E]).

        Formal guarantee: that of `clip`, for each of them.
        """
        clipped_E, shortened_E = jax.vmap(self.clip)(trees_E)
        summed = jax.tree.map(lambda leaf_E: counted_sum(leaf_E, counts_E), clipped_E)
        return summed, shortened_E


Clip = Joint | PerFactor | PerLayer


def as_clip(clip_norm: Bound | Clip) -> Clip:
    """A kind as it is; a number or a traced scalar as the norm of `Joint`."""
    if isinstance(clip_norm, Joint | PerFactor | PerLayer):
        return clip_norm
    # As an array, so that what is zero or not finite meets `clip`'s table and not an error.
    return Joint(jnp.asarray(clip_norm, jnp.float32))


def leaf_sides(tree: PyTree) -> list[str]:
    """The key, "a" or "b", that each leaf stands under.

    Raises:
        UserError: a leaf stands under neither.
    """
    sides = []
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        side = str(getattr(path[-1], "key", "")) if path else ""
        if side not in ("a", "b"):
            raise UserError(
                f"{jax.tree_util.keystr(path) or 'the tree'} is no plain factor: clipping per "
                'factor needs leaves under "a" and "b"; use joint clipping'
            )
        sides.append(side)
    return sides
