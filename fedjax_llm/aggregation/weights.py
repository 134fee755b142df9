"""How much each client counts in the mean.

| symbol | name |
|---|---|
| p_k | a client's public share: 1, its rows, or a number of the run file |
| a_k | FedNova's norm of its local steps; 1 without FedNova |
| L_k | its mean training loss in this round, nats |
| D_k | its rows |
| B_k | its uplink, megabits per second |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError

# Squared, it is still far from the end of float32.
_LARGEST_BOUND = 1e6

Kind = Literal["uniform", "examples", "tokens"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights that are known before a round begins.

    The update is ``sum of w_k Delta_k / divisor`` over the clients that take part, with w_k in
    (0, 1] so that a weight cannot lengthen a message beyond its clip norm.

    Attributes:
        contributions_K: w_k = (p_k / a_k) / max of p / a, float32.
        shares_K: p_k, float64.
        norms_K: a_k, float64.
        kind: what they follow from, as the privacy plan calls it; "uniform" stands for all public
            numbers. Others are refused with privacy unit `client`, which is to hide them.
    """

    contributions_K: NDArray[np.float32]
    shares_K: NDArray[np.float64]
    norms_K: NDArray[np.float64]
    kind: Kind

    @classmethod
    def of(
        cls,
        values: Sequence[float] | None,
        clients: int,
        *,
        norms: Sequence[float] | None = None,
        kind: Kind | None = None,
    ) -> "Weights":
        """Scales public numbers to weights.

        Args:
            values: p_k, positive; uniform if None.
            clients: K.
            norms: a_k, positive, from `step_norm`; 1 if None.
            kind: "uniform" for numbers that are public, "examples" or "tokens" for those that
                follow from data; "examples" if None and `values` are given.

        Raises:
            UserError: not `clients` positive finite numbers.
        """
        shares_K, norms_K = (
            _checked(given, clients, what)
            for given, what in ((values, "weights"), (norms, "norms of local steps"))
        )
        kind = kind or ("uniform" if values is None else "examples")
        ratio_K = shares_K / norms_K
        contributions_K = (ratio_K / ratio_K.max()).astype(np.float32)
        if np.any(contributions_K < np.finfo(np.float32).tiny):
            raise UserError(f"weights {list(values or ())} differ by more than float32 can hold")
        return cls(contributions_K, shares_K, norms_K, kind)

    def divisor(self, online_K: NDArray[np.bool_]) -> float:
        """The public number that turns the sum over these clients into the update.

        Without FedNova the sum of the weights. With it (arXiv 2007.07481, equation 9) the update is
        tau times the mean of Delta_k / a_k with weights p_k, where tau is the mean of a_k.
        """
        shares_K, norms_K = self.shares_K[online_K], self.norms_K[online_K]
        largest = float((self.shares_K / self.norms_K).max())
        total = float(shares_K.sum())
        return total * total / float((shares_K * norms_K).sum()) / largest

    @property
    def normalises_steps(self) -> bool:
        """Whether clients of different numbers of local steps are weighed against each other."""
        return bool(np.any(self.norms_K != self.norms_K[0]))


def _checked(values: Sequence[float] | None, count: int, what: str) -> NDArray[np.float64]:
    if values is None:
        return np.ones(count)
    numbers = np.asarray(values, np.float64)
    if numbers.shape != (count,) or not np.all(np.isfinite(numbers)) or np.any(numbers <= 0):
        raise UserError(f"{what} must be {count} positive numbers, got {list(values)}")
    return numbers


def step_norm(steps: int, momentum: float = 0.0) -> float:
    """FedNova's a_k for sgd with momentum (arXiv 2007.07481, section 4.2); the steps without.

    For other local optimisers the paper gives no closed form; the number of steps is used. With
    momentum the formula is for a buffer that starts empty each round; here clients keep theirs.

    >>> step_norm(4), round(step_norm(2, 0.5), 6)
    (4.0, 2.5)
    """
    if momentum == 0.0:
        return float(steps)
    geometric = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - geometric) / (1 - momentum)


@dataclass(frozen=True)
class LossWeights:
    """The dynamic rule of the cross-cloud papers (arXiv 2503.12226): L_k / (D_k B_k^alpha).

    As published, the weights of a round are omega_k over their sum, with omega_k as above; larger
    for clouds of high loss, few rows and thin links. A client that reports a huge loss takes the
    round over, and loss and rows are private data without a bound.

    With `bound` = c, the weight is omega_k over that of an ordinary cloud, limited to [1 / c, c]
    and divided by c. A loss that is not finite counts lowest.

    Formal guarantee of the bounded variant: whatever a client's loss and rows, its weight is in
    [1 / c^2, 1] and depends on nothing of any other client. So a weighted message that is clipped
    to C afterwards keeps the sum's sensitivity of C under adding or removing a client, if the sum
    is divided by a public number (`ordinary` times the clients); and no client counts more than c
    times as much as an ordinary one.

    Attributes:
        alpha: exponent of the bandwidth.
        bound: c, above 1; None is the rule as published.
        loss: of an ordinary cloud, nats; a public guess, as the next two.
        rows: of an ordinary cloud.
        up_mbps: of an ordinary cloud's uplink, megabits per second.
    """

    alpha: float = 0.5
    bound: float | None = None
    loss: float = 3.0
    rows: float = 1000.0
    up_mbps: float = 100.0

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        if not 0 <= self.alpha <= 4:
            raise UserError(f"the exponent alpha must be between 0 and 4, got {self.alpha}")
        if self.bound is not None and not 1 < self.bound <= _LARGEST_BOUND:
            raise UserError(
                f"the bound of a weight must be above 1 and at most {_LARGEST_BOUND:g}, "
                f"got {self.bound}"
            )
        for what in ("loss", "rows", "up_mbps"):
            if not 0 < getattr(self, what) < math.inf:
                raise UserError(f"an ordinary cloud's {what} must be positive and finite")

    def beforehand(self, rows: Sequence[int], up_mbps: Sequence[float]) -> NDArray[np.float32]:
        """(D_k B_k^alpha)^-1 over that of an ordinary cloud, [K]."""
        sizes_K, bandwidths_K = np.asarray(rows, np.float64), np.asarray(up_mbps, np.float64)
        relative_K = (self.rows / sizes_K) * (self.up_mbps / bandwidths_K) ** self.alpha
        return relative_K.astype(np.float32)

    def weight(self, beforehand: jax.Array, loss: jax.Array) -> jax.Array:
        """A client's weight from `beforehand` and its loss, float32 scalars."""
        relative = beforehand * (loss / jnp.float32(self.loss))
        if self.bound is None:
            return relative
        bound = jnp.float32(self.bound)
        relative = jnp.where(jnp.isfinite(relative), relative, jnp.float32(0))
        return jnp.clip(relative, 1 / bound, bound) / bound

    @property
    def ordinary(self) -> float:
        """The bounded weight of an ordinary cloud."""
        assert self.bound is not None
        return 1.0 / self.bound
