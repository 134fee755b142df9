"""Everything is sent as it is."""

from dataclasses import dataclass

import jax

from fedjax_llm.compression.codec import Codec, Facts, PyTree


@dataclass(frozen=True)
class Identity(Codec):
    """A = I: what the others are compared with."""

    name = "identity"
    source = "none"
    summary = "everything, as it is"

    @property
    def facts(self) -> Facts:
        """Nothing is lost."""
        return Facts(unbiased=True, projects=True, steady=True, lossless_on="everything")

    def _encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> PyTree:
        return tree

    def decode(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: PyTree, shared: PyTree = ()
    ) -> PyTree:
        """The mean."""
        return mean
