"""Fragments: the layers take turns.

Letters: L layers, N fragments, S = ceil(L / N) layers of a fragment.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.compression.codec import Codec, Facts, PyTree
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Fragment(Codec):
    """A is the rows of the identity that belong to this round's layers.

    Round r, from 0, sends the layers f, f + N, f + 2 N, .. with f = r mod N: the strided fragments
    of streaming DiLoCo (arXiv 2501.18512, section 2.2). Every layer is sent once in N rounds. Where
    N does not divide L, a fragment that is one layer short sends zeros in its place, so that all
    encodings have one size.

    Attributes:
        fragments: N, at least 1 and at most L.
    """

    fragments: int = 4

    name = "fragment"
    source = "arXiv 2501.18512"
    summary = "the layers in turn, each once in so many rounds"

    def __post_init__(self) -> None:
        """Raises UserError for fewer than one fragment."""
        if self.fragments < 1:
            raise UserError(f"fragments must be at least 1, got {self.fragments}; 4 is usual")

    @property
    def facts(self) -> Facts:
        """A projection."""
        return Facts(
            unbiased=self.fragments == 1,
            projects=True,
            steady=False,
            lossless_on="everything" if self.fragments == 1 else "the layers whose turn it is",
            keeps="how many rounds have been",
        )

    def init(self, like: PyTree) -> jax.Array:
        """The number of rounds so far, int32.

        Raises:
            UserError: an array has fewer layers than there are fragments, or no axis at all.
        """
        for leaf in jax.tree.leaves(like):
            layers = leaf.shape[0] if leaf.shape else 0
            if layers < self.fragments:
                raise UserError(
                    f"{self.fragments} fragments need as many layers in every array, got one of "
                    f"shape {tuple(leaf.shape)}; use at most {layers} fragments, or another codec"
                )
        return jnp.int32(0)

    def _encode(
        self, state: jax.Array, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> PyTree:
        def turn(x: jax.Array) -> jax.Array:
            length = self._length(x.shape[0])
            padding = [(0, length * self.fragments - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
            x_SxN = jnp.pad(x, padding).reshape(length, self.fragments, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(x_SxN, state, axis=1, keepdims=False)

        return jax.tree.map(turn, tree)

    def decode(
        self, like: PyTree, state: jax.Array, key: jax.Array, mean: PyTree, shared: PyTree = ()
    ) -> PyTree:
        """The layers at their places, zeros elsewhere."""

        def back(leaf: jax.Array, y: jax.Array) -> jax.Array:
            zeros = jnp.zeros((y.shape[0], self.fragments, *y.shape[1:]), jnp.float32)
            x_SxN = jax.lax.dynamic_update_index_in_dim(zeros, y, state, axis=1)
            return x_SxN.reshape(-1, *y.shape[1:])[: leaf.shape[0]]

        return jax.tree.map(back, like, mean)

    def advance(
        self, like: PyTree, state: jax.Array, key: jax.Array, mean: PyTree, shared: PyTree = ()
    ) -> jax.Array:
        """The next fragment's turn."""
        return (state + 1) % jnp.int32(self.fragments)

    def _length(self, layers: int) -> int:
        return -(-layers // self.fragments)
