"""The middle of each coordinate: its median, or its mean without the extremes (arXiv 1803.01498).

Letters: K clients, P parameters; n clients present.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.robust import masked
from fedjax_llm.aggregation.robust.combine import Combine, PyTree, require, require_count


def trimmed_mean(messages_KxP: jax.Array, present_K: jax.Array, trim: jax.Array) -> jax.Array:
    """[P] float32: per coordinate, the mean without its `trim` least and greatest values.

    `trim` is [] int32 and lowered to (n - 1) // 2 where it would leave nothing: the median then.
    """
    number = masked.count(present_K)
    trim = jnp.clip(trim, jnp.int32(0), jnp.maximum(number - jnp.int32(1), jnp.int32(0)) // 2)
    place_K = jnp.arange(present_K.shape[0], dtype=jnp.int32)
    kept_K = (place_K >= trim) & (place_K < number - trim)
    # The +inf of those absent sorts to the places from n on, which are never kept.
    return masked.mean(masked.sorted_columns(messages_KxP, present_K), kept_K)


def coordinate_median(messages_KxP: jax.Array, present_K: jax.Array) -> jax.Array:
    """[P] float32: the median of each coordinate, half-way between the middle two if n is even."""
    return trimmed_mean(messages_KxP, present_K, jnp.int32(present_K.shape[0]))


@dataclass(frozen=True)
class CoordinateMedian(Combine):
    """The median of each coordinate (definition 1); robust while more than half are honest."""

    name: ClassVar[str] = "median"
    source: ClassVar[str] = "1803.01498"
    summary: ClassVar[str] = "median of each coordinate"

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        return coordinate_median(messages_KxP, present_K), memory

    def check(self, clients: int) -> None:
        require(self.name, clients, 1, "a median of nothing is undefined")


@dataclass(frozen=True)
class TrimmedMean(Combine):
    """Per coordinate, the mean without the f least and f greatest values (definition 2).

    Robust against f malicious clients when n >= 2f + 1 are present. The paper states the cut as a
    fraction of n; here it is f clients at either end, however many are present.

    Attributes:
        byzantine: f.
    """

    byzantine: int
    name: ClassVar[str] = "trimmed-mean"
    source: ClassVar[str] = "1803.01498"
    summary: ClassVar[str] = "mean of each coordinate without its f least and f greatest values"

    def __post_init__(self) -> None:
        require_count(self.name, "byzantine", self.byzantine, 0)

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        return trimmed_mean(messages_KxP, present_K, jnp.int32(self.byzantine)), memory

    def check(self, clients: int) -> None:
        require(self.name, clients, 2 * self.byzantine + 1, f"2f + 1 with f = {self.byzantine}")
