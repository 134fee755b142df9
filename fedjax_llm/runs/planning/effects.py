"""How much work each choice costs, learnt from a few pilots: an additive model of its logarithm.

    log(local steps until the target) = mean + sum over axes of an effect of the choice on that axis

Effects are shrunk towards zero (ridge), so that a choice which no pilot had is taken to cost
nothing, and one that a single pilot had is believed in part. This is a guide to what to try next,
never a forecast: what is chosen has had a pilot of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.runs.planning.candidates import Candidate

_SHRINK = 1.0


@dataclass(frozen=True)
class Effects:
    """A fitted model.

    Attributes:
        mean: of the logarithms.
        of: effect by axis and choice.
    """

    mean: float
    of: dict[tuple[str, str], float]

    def work(self, candidate: Candidate) -> float:
        """Local steps until the target, as far as the pilots tell."""
        return float(np.exp(self.mean + sum(self.of.get(axis, 0.0) for axis in candidate.axes)))


def effects(candidates: Sequence[Candidate], work: Sequence[float]) -> Effects:
    """Fits the model.

    Args:
        candidates: that had a pilot.
        work: local steps until the target of each, positive and finite.
    """
    axes = sorted({axis for one in candidates for axis in one.axes})
    design = np.array([[float(axis in one.axes) for axis in axes] for one in candidates])
    logs = np.log(np.asarray(work, np.float64))
    mean = float(logs.mean())
    normal = design.T @ design + _SHRINK * np.eye(len(axes))
    found = np.linalg.solve(normal, design.T @ (logs - mean))
    return Effects(mean, dict(zip(axes, found.tolist(), strict=True)))
