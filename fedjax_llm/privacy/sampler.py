"""What a sampler does, as the accountant and the training code each describe it."""

from dataclasses import dataclass
from typing import Literal, get_args

from fedjax_llm.errors import UserError

from .sampling import float32_rate

Unit = Literal["none", "example", "client"]
Kind = Literal["poisson", "full", "fixed"]


@dataclass(frozen=True)
class SamplerSpec:
    """How units come to take part in the mechanism.

    Attributes:
        kind: "poisson" (each unit independently), "full" (every unit every time, so no
            amplification) or "fixed" (batches of a fixed size, which have no certified epsilon).
        rates: probability with which a unit takes part in one step; for unit "example" one per
            cloud, for unit "client" a single one. Rounded down to float32, which is what
            `poisson_sample` realises. All 1 for "full"; empty for "fixed".
        steps_per_round: mechanisms per round: local steps for unit "example", 1 for "client".

    Raises:
        UserError: a rate is not in [2^-32, 1], or does not fit the kind; steps_per_round below one.
    """

    kind: Kind
    rates: tuple[float, ...]
    steps_per_round: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"sampler must be one of {', '.join(get_args(Kind))}; got {self.kind}")
        if self.steps_per_round < 1:
            raise UserError(f"steps per round must be at least 1, got {self.steps_per_round}")
        for rate in self.rates:
            if not 2.0**-32 <= rate <= 1:  # poisson_sample never selects below that
                raise UserError(
                    f"a sampling rate must be in [2^-32, 1], got {rate:g}; "
                    "lower the expected batch or the rate"
                )
        if self.kind == "fixed" and self.rates:
            raise UserError("a sampler of fixed-size batches has no rates")
        if self.kind != "fixed" and not self.rates:
            raise UserError(f"a {self.kind} sampler needs a rate for each group of units")
        if self.kind == "full" and set(self.rates) != {1.0}:
            raise UserError(f"full participation has rate 1, got {self.rates}; use poisson")
        object.__setattr__(self, "rates", tuple(float32_rate(rate) for rate in self.rates))

    def describe(self) -> str:
        """A few words for statements and errors."""
        if self.kind == "fixed":
            return f"fixed-size batches, {self.steps_per_round} per round"
        if self.kind == "full":
            return f"full participation, {self.steps_per_round} per round"
        low, high = min(self.rates), max(self.rates)
        rates = f"rate {high:.6g}" if low == high else f"rates {low:.6g} to {high:.6g}"
        return f"Poisson sampling at {rates}, {self.steps_per_round} per round"
