"""What a candidate is expected to take until the target, and how a plan compares two of them."""

import math
from dataclasses import dataclass

from fedjax_llm.federation.outlook import Totals
from fedjax_llm.runs.planning.candidates import Candidate
from fedjax_llm.runs.sections.plan import ForecastSection, Objective, PlanSection

MEASURES: tuple[Objective, ...] = ("seconds", "dollars", "bytes")


@dataclass(frozen=True)
class Forecast:
    """Of one candidate.

    Attributes:
        candidate: how it runs.
        rounds: server steps until the target, the median.
        low: the 10 percent quantile.
        high: the 90 percent quantile, or as far as the forecast looks.
        seconds: virtual.
        bytes: both ways.
        dollars: of all clouds.
        epsilon: after `rounds`; None without a unit.
        noise: [privacy] noise_multiplier; None without a unit.
        pilot_rounds: that were trained for it; 0 where none were.
    """

    candidate: Candidate
    rounds: int
    low: int
    high: int
    seconds: float
    bytes: float
    dollars: float
    epsilon: float | None = None
    noise: float | None = None
    pilot_rounds: int = 0

    @classmethod
    def of(
        cls, candidate: Candidate, totals: Totals, rounds: int, low: int, high: int, **more: object
    ) -> "Forecast":
        """Reads the costs of `rounds` server steps off a simulation."""
        at = rounds - 1
        return cls(
            candidate,
            rounds,
            low,
            high,
            float(totals.seconds_N[at]),
            float(totals.bytes_N[at]),
            float(totals.dollars_N[at]),
            **more,  # type: ignore[arg-type]
        )

    def section(self) -> ForecastSection:
        """For the run file."""
        return ForecastSection(
            rounds=self.rounds,
            rounds_low=self.low,
            rounds_high=self.high,
            seconds=self.seconds,
            bytes=self.bytes,
            dollars=self.dollars,
            epsilon=self.epsilon,
        )


def over_budget(forecast: Forecast, plan: PlanSection) -> dict[Objective, float]:
    """The budgets that a forecast exceeds, and what it takes of each."""
    budgets: dict[Objective, float | None] = {
        "seconds": plan.max_seconds,
        "dollars": plan.max_dollars,
        "bytes": plan.max_bytes,
    }
    found = {name: float(getattr(forecast, name)) for name in MEASURES}
    return {
        name: found[name]
        for name, most in budgets.items()
        if most is not None and found[name] > most
    }


def cost(forecast: Forecast | None, plan: PlanSection) -> tuple[int, float]:
    """By which candidates are ordered: within all budgets first, then by what is minimised."""
    if forecast is None:
        return 2, math.inf
    return int(bool(over_budget(forecast, plan))), float(getattr(forecast, plan.minimise))
