"""Krum: trust the messages that lie closest to most of the others (arXiv 1703.02757).

Letters: K clients, P parameters; f malicious clients assumed, n clients present.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.robust import masked
from fedjax_llm.aggregation.robust.combine import Combine, PyTree, require, require_count
from fedjax_llm.errors import UserError

_MAX = float(jnp.finfo(jnp.float32).max)


def scores(messages_KxP: jax.Array, present_K: jax.Array, byzantine: int) -> jax.Array:
    """[K] float32: sum of squared distances to the n - f - 2 nearest others.

    With fewer than f + 3 present, to the nearest one. Absent clients score inf; those present
    at most 3.4e38, so that one who is present always goes first.
    """
    nearest_KxK = jnp.sort(masked.squared_distances(messages_KxP, present_K), axis=1)
    neighbours = jnp.maximum(masked.count(present_K) - jnp.int32(byzantine + 2), jnp.int32(1))
    counts_K = jnp.arange(present_K.shape[0], dtype=jnp.int32) < neighbours
    total_K = jnp.where(counts_K[None], nearest_KxK, jnp.float32(0)).sum(axis=1)
    return jnp.where(present_K, jnp.minimum(total_K, jnp.float32(_MAX)), jnp.float32(jnp.inf))


def _mean_of_best(
    messages_KxP: jax.Array, present_K: jax.Array, scores_K: jax.Array, number: jax.Array
) -> jax.Array:
    order_K = jnp.argsort(scores_K, stable=True)
    place_K = jnp.argsort(order_K, stable=True).astype(jnp.int32)
    return masked.mean(messages_KxP, present_K & (place_K < number))


@dataclass(frozen=True)
class Krum(Combine):
    """The one message with the least score; of equal scores, the first.

    Robust against f malicious clients when n >= 2f + 3 are present.

    Attributes:
        byzantine: f.
    """

    byzantine: int
    name: ClassVar[str] = "krum"
    source: ClassVar[str] = "1703.02757"
    summary: ClassVar[str] = "the message closest to its n - f - 2 nearest neighbours"

    def __post_init__(self) -> None:
        require_count(self.name, "byzantine", self.byzantine, 0)

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        scores_K = scores(messages_KxP, present_K, self.byzantine)
        return _mean_of_best(messages_KxP, present_K, scores_K, jnp.int32(1)), memory

    def check(self, clients: int) -> None:
        require(self.name, clients, 2 * self.byzantine + 3, f"2f + 3 with f = {self.byzantine}")


@dataclass(frozen=True)
class MultiKrum(Combine):
    """The mean of the messages with the least scores; ties as in `Krum`.

    With f malicious clients far away and n >= 2f + 3 present, up to n - f messages are all honest:
    a malicious one has at most f - 1 allies nearby, so some of its n - f - 2 neighbours are far.

    Attributes:
        byzantine: f.
        selected: how many messages are averaged, never more than n - f; None for n - f.
    """

    byzantine: int
    selected: int | None = None
    name: ClassVar[str] = "multi-krum"
    source: ClassVar[str] = "1703.02757"
    summary: ClassVar[str] = "mean of the messages closest to their n - f - 2 nearest neighbours"

    def __post_init__(self) -> None:
        require_count(self.name, "byzantine", self.byzantine, 0)
        if self.selected is not None:
            require_count(self.name, "selected", self.selected, 1)

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        scores_K = scores(messages_KxP, present_K, self.byzantine)
        number = masked.count(present_K) - jnp.int32(self.byzantine)
        if self.selected is not None:
            number = jnp.minimum(number, jnp.int32(self.selected))
        number = jnp.maximum(number, jnp.int32(1))
        return _mean_of_best(messages_KxP, present_K, scores_K, number), memory

    def check(self, clients: int) -> None:
        require(self.name, clients, 2 * self.byzantine + 3, f"2f + 3 with f = {self.byzantine}")
        most = clients - self.byzantine
        if self.selected is not None and self.selected > most:
            raise UserError(
                f"selected of {self.name} must be at most {most}, the clients of a round less the "
                f"malicious ones, got {self.selected}; lower it or leave it out"
            )
