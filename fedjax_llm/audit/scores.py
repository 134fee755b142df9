"""White-box scores: how strongly what a run released speaks for the presence of each canary.

Whoever audits sees all that the guarantee says may be seen: the noised sum of every step with unit
example, the noised sum of every round with unit client. A score is a function of these alone, never
of the coins. Any such function keeps the audit valid; the better it is, the higher the bound.

Letters: M canaries, P parameters.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.audit.canaries import Canaries
from fedjax_llm.errors import UserError

PyTree = Any


@dataclass(frozen=True)
class Scorer:
    """Adds up scores, one released sum after another: a pair of pure functions.

    A released sum holds canary i with probability `rate` if it takes part, at length `length`,
    under Gaussian noise. With x = <released, v_i> the most powerful statistic for one canary
    (Neyman-Pearson) is the sum over what was released of

        log(1 - rate + rate * exp((x * length - length^2 / 2) / stddev^2)),

    which at rate 1 is the sum of the x up to constants: the inner product of v_i with the sum of
    all that was released. Scores above 0 speak for presence.

    Attributes:
        rate: probability with which a unit takes part in one sum, in (0, 1].
        length: l2 norm that the clip leaves of a canary.
        stddev: of each coordinate of the noise on the sum.
    """

    rate: float
    length: float
    stddev: float

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        if not 0 < self.rate <= 1:
            raise UserError(f"rate must be above 0 and at most 1, got {self.rate:g}")
        for name in ("length", "stddev"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be positive and finite, got {getattr(self, name):g}")

    def init(self, canaries: Canaries) -> jax.Array:
        """The scores before anything is released: float32 [M], zeros."""
        return jnp.zeros(canaries.count, jnp.float32)

    def add(self, canaries: Canaries, scores_M: jax.Array, released: PyTree) -> jax.Array:
        """The scores after one more released sum.

        Args:
            canaries: the canaries.
            scores_M: the scores so far.
            released: a tree of P parameters, in the unit of the sum (not of a mean).

        Returns:
            float32 [M]; memory O(P + M).
        """
        x_M = canaries.project(released) / jnp.float32(self.length)
        precision = jnp.float32((self.length / self.stddev) ** 2)
        loss_M = (x_M - jnp.float32(0.5)) * precision
        if self.rate < 1:
            absent, present = jnp.log1p(-jnp.float32(self.rate)), jnp.log(jnp.float32(self.rate))
            loss_M = jnp.logaddexp(absent, present + loss_M)
        return scores_M + loss_M


def observed(
    optimizer: optax.GradientTransformation,
    canaries: Canaries,
    scorer: Scorer,
    batch_size: float,
) -> optax.GradientTransformation:
    """The same optimiser, with the scores of what it is handed carried along in its state.

    With unit example the released thing is the noised mean gradient that the local optimiser is
    handed, whatever it makes of it (Adam included): everything after that is post-processing.

    Args:
        optimizer: the client's.
        canaries: the canaries.
        scorer: for noised sums.
        batch_size: what the sum was divided by.

    Returns:
        A transformation whose state is (the optimiser's, scores_M).
    """

    def init(params: PyTree) -> tuple[PyTree, jax.Array]:
        return optimizer.init(params), scorer.init(canaries)

    def update(
        gradient: PyTree, state: tuple[PyTree, jax.Array], params: PyTree | None = None
    ) -> tuple[PyTree, tuple[PyTree, jax.Array]]:
        inner, scores_M = state
        total = jax.tree.map(lambda leaf: leaf * jnp.float32(batch_size), gradient)
        scores_M = scorer.add(canaries, scores_M, total)
        step, inner = optimizer.update(gradient, inner, params)
        return step, (inner, scores_M)

    return optax.GradientTransformation(init, update)
