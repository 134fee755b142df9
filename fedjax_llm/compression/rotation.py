"""Rotation: the same message with its length spread evenly over all coordinates.

Letters: P numbers of a message, N the largest power of two that is at most P.
"""

import math
from dataclasses import dataclass

import jax

from fedjax_llm.compression.codec import Codec, Facts, PyTree, count, flatten, unflatten
from fedjax_llm.compression.hadamard import largest_power_of_two, rotate, unrotate
from fedjax_llm.compression.rounding import least_error_cut


@dataclass(frozen=True)
class Rotated(Codec):
    """A is a randomised Hadamard rotation (arXiv 1611.00429, stochastic rotated quantisation).

    Nothing is lost and nothing is saved; but no coordinate is long any more, so that few bits with
    one step for all of them are enough (arXiv 2102.06387, algorithm 1, flattens for the same
    reason). It comes last in a `Chain`.

    Formal guarantee of `coordinate_bound`: with n = N and t = sqrt(2 ln(2 P / tail)), all
    coordinates of the rotated x are at most t norm(x) / sqrt(n), but for a probability of `tail`.
    Proof: coordinate i of a transformed block z is sum_j h_ij s_j z_j / sqrt(n) with h_ij = +-1 and
    independent signs s_j, and Hoeffding's inequality for such sums reads
    Pr(|y_i| > t norm(z) / sqrt(n)) <= 2 exp(-t^2 / 2). The first P - n coordinates are those of the
    first block; the last n are those of the second one, whose signs are independent of what the
    first one made of x; and norm(z) <= norm(x) for both. The union over P coordinates is
    2 P exp(-t^2 / 2) = tail. Clipping multiplies all coordinates alike.
    """

    name = "rotation"
    source = "arXiv 1611.00429"
    summary = "a randomised Hadamard rotation, so that few bits are enough"

    @property
    def facts(self) -> Facts:
        """Nothing is lost."""
        return Facts(unbiased=True, projects=True, steady=False, lossless_on="everything")

    def _encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> jax.Array:
        return rotate(key, flatten(tree))

    def decode(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> PyTree:
        """The inverse rotation."""
        return unflatten(like, unrotate(key, mean))

    def _coordinate_bound(self, like: PyTree, norm: float, tail: float, stage: int) -> float:
        size = count(like)
        if tail == 0 or size == 0:
            return norm
        spread = math.sqrt(2 * math.log(2 * size / tail) / largest_power_of_two(size))
        return norm * min(1.0, spread)

    def _least_error_bound(
        self, like: PyTree, norm: float, bits: int, clients: int, stage: int
    ) -> float:
        """Rotated coordinates are sums of many independent terms, close to normal ones."""
        size = max(count(like), 1)
        return norm * min(1.0, least_error_cut(bits, clients) / math.sqrt(size))
