"""PowerSGD: two sums give the mean of matrices in the few directions that matter most.

Letters: L layers, D rows, F columns, S rank that is sent.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.compression.codec import Codec, Facts, PyTree
from fedjax_llm.errors import UserError
from fedjax_llm.lora import algebra


class Halves(NamedTuple):
    """What a stage sends.

    Attributes:
        matrices: of each compressed array, [L, D, S] in stage 0 and [L, F, S] in stage 1.
        others: in stage 1 the arrays that go whole; empty in stage 0.
    """

    matrices: tuple[jax.Array, ...]
    others: tuple[jax.Array, ...]


@dataclass(frozen=True)
class PowerSgd(Codec):
    """One step of subspace iteration a round, which goes on where the last one ended.

    Arrays of [.., D, F] are stacks of matrices M. Stage 0 sends M Q; the server answers with an
    orthonormal basis P of the mean; stage 1 sends M' P, and P (M' P)' is decoded (arXiv 1905.13727,
    algorithms 1 and 2). Arrays that would not get smaller, and vectors, go whole in stage 1. Given
    P, decoding after encoding is the projection P P', the same for all clients, and each client's
    residual is what algorithm 2 keeps as its error.

    One thing differs from the paper: Q, too, is made orthonormal, by the server between rounds.
    The span of M Q, which is all that counts, stays the same, and neither stage lengthens a
    message, so that one clip norm serves both. A matrix whose mean is zero keeps its Q.

    A client sends two encodings of one message: a privacy plan has to count both sums.

    Attributes:
        rank: S, at least 1.
    """

    rank: int = 2

    name = "power-sgd"
    source = "arXiv 1905.13727"
    summary = "the best few directions of each matrix, in two sums"

    def __post_init__(self) -> None:
        """Raises UserError for a rank below 1."""
        if self.rank < 1:
            raise UserError(f"rank of {self.name} must be at least 1, got {self.rank}")

    @property
    def stages(self) -> int:
        """M Q, then M' P."""
        return 2

    @property
    def facts(self) -> Facts:
        """A projection."""
        return Facts(
            unbiased=False,
            projects=True,
            steady=False,
            lossless_on="matrices whose columns lie in the span of the columns of M Q of the mean; "
            "for almost every Q, a mean of rank S or less",
            keeps="Q, orthonormal, F x S numbers for each matrix",
        )

    def init(self, like: PyTree) -> tuple[jax.Array, ...]:
        """Q of each compressed array, [L, F, S], random.

        Raises:
            UserError: no array would get smaller.
        """
        shapes = [leaf.shape for leaf in jax.tree.leaves(like) if self._compresses(leaf)]
        if not shapes:
            largest = max((leaf.shape for leaf in jax.tree.leaves(like)), key=math.prod, default=())
            raise UserError(
                f"rank {self.rank} of {self.name} makes no array of the message smaller, the "
                f"largest has shape {tuple(largest)}; lower the rank, or use another codec"
            )
        return tuple(
            algebra.orthonormal(
                jax.random.normal(
                    jax.random.fold_in(jax.random.key(0), index),
                    (*shape[:-2], shape[-1], self.rank),
                    jnp.float32,
                )
            )
            for index, shape in enumerate(shapes)
        )

    def _encode(
        self,
        state: tuple[jax.Array, ...],
        key: jax.Array,
        tree: PyTree,
        stage: int,
        shared: tuple[jax.Array, ...],
    ) -> Halves:
        matrices, others = self._parted(tree)
        if stage == 0:
            products = zip(matrices, state, strict=True)
            return Halves(tuple(algebra.matmul(m, q_LxFxS) for m, q_LxFxS in products), ())
        products = zip(matrices, shared, strict=True)
        return Halves(tuple(algebra.matmul_tn(m, p_LxDxS) for m, p_LxDxS in products), others)

    def between(
        self, like: PyTree, state: tuple[jax.Array, ...], key: jax.Array, mean: Halves
    ) -> tuple[jax.Array, ...]:
        """P of each compressed array, [L, D, S], with orthonormal columns."""
        return tuple(algebra.orthonormal(mean_LxDxS) for mean_LxDxS in mean.matrices)

    def decode(
        self,
        like: PyTree,
        state: tuple[jax.Array, ...],
        key: jax.Array,
        mean: Halves,
        shared: PyTree = (),
    ) -> PyTree:
        """P (M' P)' of the mean."""
        leaves, structure = jax.tree.flatten(like)
        products = zip(shared, mean.matrices, strict=True)
        found = iter([algebra.matmul_nt(p_LxDxS, q_LxFxS) for p_LxDxS, q_LxFxS in products])
        whole = iter(mean.others)
        arrays = [next(found if self._compresses(leaf) else whole) for leaf in leaves]
        return jax.tree.unflatten(structure, arrays)

    def advance(
        self,
        like: PyTree,
        state: tuple[jax.Array, ...],
        key: jax.Array,
        mean: Halves,
        shared: PyTree = (),
    ) -> tuple[jax.Array, ...]:
        """The next round's Q: an orthonormal basis of the mean of M' P."""

        def next_q(q_LxFxS: jax.Array, mean_LxFxS: jax.Array) -> jax.Array:
            found = jnp.any(mean_LxFxS != 0, axis=(-2, -1), keepdims=True)
            return jnp.where(found, algebra.orthonormal(mean_LxFxS), q_LxFxS)

        return tuple(next_q(*pair) for pair in zip(state, mean.matrices, strict=True))

    def _compresses(self, leaf: jax.Array) -> bool:
        if len(leaf.shape) < 2:
            return False
        rows, columns = leaf.shape[-2:]
        return self.rank * (rows + columns) < rows * columns

    def _parted(self, tree: PyTree) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        leaves = jax.tree.leaves(tree)
        matrices = [leaf for leaf in leaves if self._compresses(leaf)]
        return matrices, tuple(leaf for leaf in leaves if not self._compresses(leaf))
