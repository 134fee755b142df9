"""What a sampler does, as the accountant and the training code each describe it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedjax_llm.errors import UserError

from .sampling import float32_rate

Unit = Literal["none", "example", "user", "client"]
Kind = Literal["poisson", "full", "fixed"]


@dataclass(frozen=True)
class SamplerSpec:
    """How units come to take part in the mechanism.

    Attributes:
        kind: "poisson" (each unit independently), "full" (every unit every time, so no
            amplification) or "fixed" (batches of a fixed size, which have no certified epsilon).
        rates: probability with which a unit takes part in a step in which it is its turn; for unit
            "client" a single one, for the others one per cloud. Rounded down to float32, which is
            what `poisson_sample` realises. All 1 for "full"; empty for "fixed".
        steps_per_round: mechanisms per round: 1 for unit "client", local steps for the others.
        period: a unit's turn comes every so many steps, the same place in each period: units are
            divided into so many groups, each by what it is and not by what the others are
            (cyclic sampling, arXiv 2306.08153). 1 is a turn in every step.

    Raises:
        UserError: a rate is not in [2^-32, 1], or does not fit the kind; steps_per_round or period
            below one.
    """

    kind: Kind
    rates: tuple[float, ...]
    steps_per_round: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"sampler must be one of {', '.join(get_args(Kind))}; got {self.kind}")
        if self.steps_per_round < 1:
            raise UserError(f"steps per round must be at least 1, got {self.steps_per_round}")
        if self.period < 1:
            raise UserError(f"the period of sampling must be at least 1, got {self.period}")
        if self.kind == "fixed" and self.period > 1:
            raise UserError("fixed-size batches have no period; use poisson or full sampling")
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

    @classmethod
    def for_batches(
        cls,
        counts: Sequence[int],
        expected_batch: float | Sequence[float],
        steps_per_round: int,
        period: int,
        units: str = "units",
    ) -> "SamplerSpec":
        """Poisson samples of a mean size; "full" where that is everyone in every cloud.

        Args:
            counts: units of each cloud, each at least one.
            expected_batch: mean size of one step's sample, in every cloud or in each.
            steps_per_round: as the attribute.
            period: as the attribute.
            units: what the units are, for an error.

        Raises:
            UserError: a cloud has fewer units than that in one of its groups; another number of
                sizes than of clouds; as `SamplerSpec`.
        """
        if period < 1:
            raise UserError(f"the period of sampling must be at least 1, got {period}")
        given = np.asarray(expected_batch, float)
        alike = given.ndim == 0
        if not alike and given.shape != (len(counts),):
            raise UserError(
                f"{len(counts)} expected batches are needed, one for each number of {units}, "
                f"got {given.tolist()}"
            )
        batches: list[float] = np.broadcast_to(given, (len(counts),)).tolist()
        smallest = min(range(len(counts)), key=counts.__getitem__)
        for cloud in [smallest] if alike else range(len(counts)):
            most = counts[cloud] / period
            if not 0 < batches[cloud] <= most:
                which = "the smallest cloud" if alike else f"number {cloud + 1} of {list(counts)}"
                among = f" divided by the period {period}" if period > 1 else ""
                raise UserError(
                    f"expected batch must be above 0 and at most {most:g}, the {units} of "
                    f"{which}{among}, got {batches[cloud]:g}: a sampling rate cannot exceed 1"
                )
        rates = tuple(
            min(1.0, batch * period / count) for batch, count in zip(batches, counts, strict=True)
        )
        return cls(_kind(rates), rates, steps_per_round, period)

    def scaled(self, factor: float) -> "SamplerSpec":
        """This sampler with all rates times a factor that leads none above 1."""
        rates = tuple(rate * factor for rate in self.rates)
        return dataclasses.replace(self, kind=_kind(rates), rates=rates)

    def describe(self) -> str:
        """A few words for statements and errors."""
        turns = f" of one group in {self.period}" if self.period > 1 else ""
        if self.kind == "fixed":
            return f"fixed-size batches, {self.steps_per_round} per round"
        if self.kind == "full":
            return f"full participation{turns}, {self.steps_per_round} per round"
        low, high = min(self.rates), max(self.rates)
        rates = f"rate {high:.6g}" if low == high else f"rates {low:.6g} to {high:.6g}"
        return f"Poisson sampling{turns} at {rates}, {self.steps_per_round} per round"

    def turns(self, steps: int) -> int:
        """In how many of the steps a unit's turn comes, at most."""
        return -(-steps // self.period)


def _kind(rates: tuple[float, ...]) -> Kind:
    return "full" if set(rates) == {1.0} else "poisson"
