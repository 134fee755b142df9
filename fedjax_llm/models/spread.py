"""A weight of which each device of axis `data` holds a part, gathered just before it is used.

To gather, all devices of the axis have to come to the same place, and as often: loops and branches
around a use of the base are those of `fedjax_llm_kernels.lockstep`.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fedjax_llm.models.quantised import Quantised
from fedjax_llm_kernels.lockstep import DATA

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread(Quantised):
    """A weight, float or quantised, cut along axis `data`.

    Inside a program that is manual over the axis the leaves are this device's parts; elsewhere they
    are whole arrays that lie in parts. It stands in the place of a kernel: `frozen_matmul` makes it
    whole forward and again backward, so that no more than one layer is whole at a time.

    Attributes:
      parts: the weight.
      dims: for each of its arrays the dimension that is cut, from the end; None for one that is
        whole everywhere.
    """

    parts: Any
    dims: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is here."""
        shape: tuple[int, ...] = self.parts.shape
        return shape

    def gathered(self) -> Any:
        """The whole weight, as it was before it was cut: the same bits."""
        leaves, tree = jax.tree.flatten(self.parts)
        whole = [
            part
            if dim is None
            else jax.lax.all_gather(part, DATA, axis=part.ndim + dim, tiled=True)
            for part, dim in zip(leaves, self.dims, strict=True)
        ]
        return jax.tree.unflatten(tree, whole)

    def dequantised(self) -> jax.Array:
        """The whole kernel; a float one in its own dtype."""
        whole = self.gathered()
        floats: jax.Array = whole.dequantised() if isinstance(whole, Quantised) else whole
        return floats


def spread(weights: PyTree, specs: PyTree) -> PyTree:
    """Marks the weights that are cut along `data`; others stay as they are.

    Args:
      weights: pytree of arrays and `Quantised`.
      specs: the partition of each array, of the same structure.
    """

    def one(weight: Any, spec: Any) -> Any:
        dims = tuple(
            _dimension(each, leaf.ndim)
            for each, leaf in zip(jax.tree.leaves(spec), jax.tree.leaves(weight), strict=True)
        )
        return weight if all(dim is None for dim in dims) else Spread(weight, dims)

    return jax.tree.map(one, weights, specs, is_leaf=lambda leaf: isinstance(leaf, Quantised))


def whole(weight: Any) -> Any:
    """A weight to be read as a whole; what is not cut is returned as it is."""
    return weight.gathered() if isinstance(weight, Spread) else weight


def joined(tree: PyTree) -> PyTree:
    """Outside of manual programs: the same arrays without the mark."""
    return jax.tree.map(
        lambda leaf: leaf.parts if isinstance(leaf, Spread) else leaf, tree, is_leaf=_is_spread
    )


def manual_specs(tree: PyTree) -> PyTree:
    """For `jax.shard_map`: the partition of each array along `data`, and along no other axis."""

    def one(node: Any) -> Any:
        if not isinstance(node, Spread):
            return PartitionSpec()
        leaves, structure = jax.tree.flatten(node)
        cuts = [
            PartitionSpec()
            if dim is None
            else PartitionSpec(
                *(DATA if at == leaf.ndim + dim else None for at in range(leaf.ndim))
            )
            for leaf, dim in zip(leaves, node.dims, strict=True)
        ]
        return jax.tree.unflatten(structure, cuts)

    return jax.tree.map(one, tree, is_leaf=_is_spread)


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, Spread)


def _dimension(spec: PartitionSpec, ndim: int) -> int | None:
    """Where a partition cuts along `data`, from the end; None where it does not."""
    for at, axes in enumerate(spec):
        if axes == DATA or (isinstance(axes, tuple) and DATA in axes):
            return at - ndim
    return None
