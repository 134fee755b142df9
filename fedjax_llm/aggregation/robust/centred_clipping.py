"""Each message is pulled towards the last result, as far as a radius allows (arXiv 2012.10333).

Letters: K clients, P parameters.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.robust import masked
from fedjax_llm.aggregation.robust.combine import Combine, PyTree, require, require_count
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class CentredClipping(Combine):
    """v <- v + mean_k (x_k - v) min(1, radius / |x_k - v|), from the v of the round before.

    The first v is zero. One client moves v by at most radius / n in an iteration,
    n being the clients present, wherever its message lies; v moves by at most
    `iterations` x `radius` in a round, so a radius far below the length of the honest messages
    lags behind them.

    Attributes:
        radius: l2, in the unit of the messages.
        iterations: steps in a round.
    """

    radius: float
    iterations: int = 3
    name: ClassVar[str] = "centred-clipping"
    source: ClassVar[str] = "2012.10333"
    summary: ClassVar[str] = "mean of the messages clipped around the last round's result"

    def __post_init__(self) -> None:
        require_count(self.name, "iterations", self.iterations, 1)
        if not 0 < self.radius < math.inf:
            raise UserError(
                f"radius of {self.name} must be positive and finite, got {self.radius}; "
                "take the usual length of an honest message"
            )

    def init(self, size: int) -> jax.Array:
        return jnp.zeros((size,), jnp.float32)

    def combine(
        self, messages_KxP: jax.Array, present_K: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        def step(_: jax.Array, centre_P: jax.Array) -> jax.Array:
            offsets_KxP = masked.only(messages_KxP - centre_P[None], present_K)
            length_K = jnp.maximum(masked.norms(offsets_KxP), jnp.float32(masked.TINY))
            shrink_K = jnp.minimum(jnp.float32(self.radius) / length_K, jnp.float32(1))
            return centre_P + masked.mean(shrink_K[:, None] * offsets_KxP, present_K)

        centre_P = jax.lax.fori_loop(0, self.iterations, step, memory)
        return centre_P, centre_P

    def check(self, clients: int) -> None:
        require(self.name, clients, 1, "a mean of nothing is undefined")
