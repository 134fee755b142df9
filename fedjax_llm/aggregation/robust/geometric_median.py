"""The point with the least sum of distances to the messages (RFA, arXiv 1912.13445).

Letters: K clients, P parameters.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.robust import masked
from fedjax_llm.aggregation.robust.combine import Combine, PyTree, require, require_count
from fedjax_llm.aggregation.robust.median import coordinate_median
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class GeometricMedian(Combine):
    """The geometric median by smoothed Weiszfeld steps (algorithm 2), every client of weight 1.

    A step moves to the mean of the messages weighted by 1 / max(nu, distance). nu is relative:
    `smoothing` times the median, over those present, of the distance to the start. Scaling all
    messages therefore scales the result, and a minority cannot move nu at will.

    It starts at the median of each coordinate, not at the mean as is usual: from a mean that one
    client has put far away, the number of steps needed grows with that distance.

    Robust while more than half of those present are honest.

    Attributes:
        iterations: Weiszfeld steps.
        smoothing: nu, as a fraction of the median distance.
    """

    iterations: int = 8
    smoothing: float = 1e-6
    name: ClassVar[str] = "geometric-median"
    source: ClassVar[str] = "1912.13445"
    summary: ClassVar[str] = "point with the least sum of distances to the messages"

    def __post_init__(self) -> None:
        require_count(self.name, "iterations", self.iterations, 1)
        if not 0 < self.smoothing < math.inf:
            raise UserError(f"smoothing of {self.name} must be positive, got {self.smoothing}")

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        start_P = coordinate_median(messages_KxP, present_K)
        # Steps are taken relative to the start, so that a large part common to all messages does
        # not drown the distances in rounding.
        offsets_KxP = masked.only(messages_KxP - start_P[None], present_K)
        spread = coordinate_median(masked.norms(offsets_KxP)[:, None], present_K)[0]
        floor = jnp.maximum(jnp.float32(self.smoothing) * spread, jnp.float32(masked.TINY))

        def step(_: jax.Array, at_P: jax.Array) -> jax.Array:
            distance_K = masked.norms(offsets_KxP - at_P[None])
            # Weights times nu, in [0, 1]: 1 / nu may overflow when messages coincide.
            weight_K = jnp.where(present_K, floor / jnp.maximum(floor, distance_K), jnp.float32(0))
            weight_K = weight_K / jnp.maximum(weight_K.sum(), jnp.float32(masked.TINY))
            return (weight_K[:, None] * offsets_KxP).sum(axis=0)

        moved_P = jax.lax.fori_loop(0, self.iterations, step, jnp.zeros_like(start_P))
        return start_P + moved_P, memory

    def check(self, clients: int) -> None:
        require(self.name, clients, 1, "a median of nothing is undefined")
