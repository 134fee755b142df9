r"""A learning curve from few rounds, and when it will have reached a target, with its uncertainty.

The held-out loss after n rounds is taken to be

    L(n) = L_inf + a (n + n0)^-b + noise,    a >= 0, 0 <= L_inf < L(0)

a power law with saturation, the form that holds for training in general (arXiv 2001.08361, section
3; n0 is for a start in the middle of it). Few rounds do not determine four numbers, so none is
picked: every (L_inf, n0, b) of a grid is fitted in a by least squares and keeps a weight by how
well it fits, the likelihood under Gaussian noise of unknown size. The forecast is the mixture.
Later rounds weigh more: what the loss does next follows from what it does now.

The run stops after the first round at or below the target. With noise that is earlier than where
the smooth curve gets there; the mixture accounts for that, noise of different rounds being taken to
be independent.

| losses | forecast |
|---|---|
| one at or below the target | that round, without doubt |
| that do not fall | never |
| too few to fit (fewer than 4 with the start) | UserError |

Notation: R rounds of the pilot, G members of the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError

Floats = NDArray[np.float64]

_FEWEST = 4
# Of the fit: how often the loss halves its distance to the end, and where it stands on the law.
_EXPONENTS = np.geomspace(0.15, 2.0, 12)
_OFFSETS = np.geomspace(0.05, 3.0, 10)  # of the rounds of the pilot
_FLOORS = np.linspace(0.0, 0.98, 25)  # of the lowest loss
# How much more the last rounds count: a round's weight grows with its number to this power.
_RECENT = 3.0
# No pilot shows less noise than this, nats.
_LEAST_NOISE = 1e-4


@dataclass(frozen=True)
class Reach:
    """When a target will be reached, in rounds.

    Attributes:
        rounds: the median; infinite if more likely never within the horizon.
        low: the 10 percent quantile.
        high: the 90 percent quantile; infinite if that lies beyond the horizon.
    """

    rounds: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Curve:
    """The mixture of all fits.

    Attributes:
        losses: measured, the start first.
        weight_G: of each member, adding up to 1.
        floor_G: L_inf.
        scale_G: a.
        offset_G: n0.
        exponent_G: b.
        noise_G: standard deviation of a round's noise, nats.
    """

    losses: tuple[float, ...]
    weight_G: Floats
    floor_G: Floats
    scale_G: Floats
    offset_G: Floats
    exponent_G: Floats
    noise_G: Floats

    @property
    def rounds(self) -> int:
        """R."""
        return len(self.losses) - 1

    @property
    def floor(self) -> float:
        """The mean of what the members fall to in the end, nats."""
        return float(self.weight_G @ self.floor_G)

    def loss(self, rounds: Sequence[int] | NDArray[np.int64]) -> Floats:
        """The mean of the members after so many rounds."""
        return np.asarray(self._members(np.asarray(rounds, np.float64)) @ self.weight_G, np.float64)

    def reach(self, target: float, horizon: int) -> Reach:
        """When the loss is at most `target`.

        Args:
            target: nats.
            horizon: rounds to look ahead at most.
        """
        for number, loss in enumerate(self.losses[1:], start=1):
            if loss <= target:
                return Reach(number, number, number)
        rounds_N = np.arange(self.rounds + 1, max(horizon, self.rounds + 1) + 1)
        above_NxG = _above((target - self._members(rounds_N.astype(np.float64))) / self.noise_G)
        done_N = 1 - np.exp(np.cumsum(np.log(above_NxG), axis=0)) @ self.weight_G

        def quantile(part: float) -> float:
            place = int(np.searchsorted(done_N, part))
            return float(rounds_N[place]) if place < len(rounds_N) else math.inf

        return Reach(quantile(0.5), quantile(0.1), quantile(0.9))

    def _members(self, rounds_N: Floats) -> Floats:
        law = (rounds_N[:, None] + self.offset_G) ** -self.exponent_G
        return self.floor_G + self.scale_G * law


def fit(losses: Sequence[float]) -> Curve:
    """Fits a pilot.

    Args:
        losses: nats, held out, before the first round and after each.

    Raises:
        UserError: too few, or one that is not finite.
    """
    if len(losses) < _FEWEST:
        raise UserError(
            f"a learning curve takes {_FEWEST - 1} rounds or more, the pilot ran "
            f"{len(losses) - 1}; raise [plan] pilot_rounds"
        )
    if not np.isfinite(losses).all():
        raise UserError(
            "the pilot's loss is not finite; lower [training] learning_rate or the noise"
        )
    loss_N = np.asarray(losses, np.float64)
    count = len(loss_N)
    rounds_N = np.arange(count, dtype=np.float64)
    weight_N = ((1 + rounds_N) / count) ** _RECENT
    known = float(weight_N.sum() ** 2 / (weight_N @ weight_N))  # rounds' worth of evidence
    weight_N /= weight_N.mean()
    floors, offsets, exponents = np.meshgrid(
        _FLOORS * loss_N.min(), _OFFSETS * max(1, count - 1), _EXPONENTS, indexing="ij"
    )
    floor_G, offset_G, exponent_G = (grid.reshape(-1) for grid in (floors, offsets, exponents))
    law_NxG = (rounds_N[:, None] + offset_G) ** -exponent_G
    rest_NxG = loss_N[:, None] - floor_G
    scale_G = (weight_N @ (law_NxG * rest_NxG)) / (weight_N @ law_NxG**2)
    scale_G = np.maximum(scale_G, 0.0)
    misfit_G = weight_N @ (rest_NxG - scale_G * law_NxG) ** 2 / count
    noise_G = np.sqrt(misfit_G + _LEAST_NOISE**2)
    # Likelihood with the noise's size integrated out; three numbers are fitted.
    score_G = -max(known - 3, 1.0) * np.log(noise_G)
    weight_G = np.exp(score_G - score_G.max())
    return Curve(
        tuple(float(loss) for loss in losses),
        weight_G / weight_G.sum(),
        floor_G,
        scale_G,
        offset_G,
        exponent_G,
        noise_G,
    )


def _above(z: Floats) -> Floats:
    """The probability that a standard normal number is above z, never 0."""
    # Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
    t = 1 / (1 + 0.3275911 * np.abs(z) / math.sqrt(2))
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    tail = 0.5 * poly * np.exp(-z * z / 2)
    return np.maximum(np.where(z > 0, tail, 1 - tail), 1e-12)
