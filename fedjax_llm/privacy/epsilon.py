"""How an epsilon is shown: certified, or with the reason why there is none."""

from dataclasses import dataclass

from .sampler import Unit


@dataclass(frozen=True)
class EpsilonReport:
    """An epsilon that is certified, or the reason why there is none. Exactly one is None.

    Attributes:
        epsilon: certified upper bound, None when there is none.
        delta: the delta it holds at; 0 for unit "none".
        reason: why no epsilon is given.
        unit: what the epsilon is about.
        rounds: after how many rounds.
    """

    epsilon: float | None
    delta: float
    reason: str | None
    unit: Unit
    rounds: int

    def __str__(self) -> str:
        if self.epsilon is None:
            return f"no epsilon: {self.reason}"
        return (
            f"epsilon {self.epsilon:.4f} at delta {self.delta:g} per {self.unit} "
            f"after {self.rounds} rounds"
        )


@dataclass(frozen=True)
class EpsilonRow:
    """One cell of `PrivacyPlan.epsilon_table`; the rate is the largest of the clouds'."""

    noise_multiplier: float
    rounds: int
    report: EpsilonReport
    rate: float = 1.0
