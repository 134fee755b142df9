"""The privacy plan: unit, sampler, clip norm, noise and accountant bound into one object."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedjax_llm.errors import Refused, UserError

from . import accounting, spent
from .epsilon import EpsilonReport, EpsilonRow
from .mechanism import Mechanism
from .sampler import SamplerSpec
from .statement import statement


@dataclass(frozen=True)
class PrivacyPlan(Mechanism):
    """What a run promises about one privacy unit, and what it must do to keep the promise.

    Formal guarantee: if every mechanism of the run is the one described here (the sampler of
    `sampler`, contributions of l2 norm at most `clip_norm`, noise of standard deviation
    `noise_stddev` on their sum, hanging together over the steps as `correlation` says), what
    `statement` says is released after r rounds is (`epsilon(r)`, `delta`)-differentially private
    for neighbours by `adjacency`, in real arithmetic. A plan for which that cannot be certified
    cannot be made: the constructor refuses.

    What the units are and what the attributes mean, `Mechanism` says.

    | plan                                            | outcome   |
    |-------------------------------------------------|-----------|
    | sampler "fixed" with a unit                     | Refused   |
    | noise multiplier 0, negative or NaN with a unit | Refused   |
    | noise multiplier above 0 without a unit         | UserError |
    | delta outside (0, 1 / number of units)          | Refused   |
    | clip norm not positive and finite, with a unit  | UserError |
    | clip norm chosen by looking at the data         | Refused   |
    | unit "client" weighted by examples, tokens, loss or result | Refused |
    | unit "example" weighted by tokens or loss, bounded or not | Refused |
    | unit "user" weighted by examples, tokens or loss | Refused |
    | unit "example" or "user" with packed rows       | Refused   |
    | unit "client" with error feedback after the clip | Refused  |
    | trust that the unit cannot have                 | UserError |
    | neighbours by replacement with turns, correlated or integer noise | Refused |
    | adaptive clip norm with correlated or integer noise, or replacement | UserError |
    | adaptive clip norm whose count costs more than the whole | UserError |
    | noise multiplier below 0.05                     | a plan whose reports give no epsilon |
    | correlated noise that reaches a unit's next turn, sampled at random | no amplification is \
counted |
    | integer noise, clients sampled at random        | no amplification is counted |
    | budget below the epsilon of one round           | Refused   |
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not self.allowed_rounds:
            raise Refused(
                f"the budget of epsilon {self.budget:g} does not allow one round, which costs "
                f"{self.report(1)}; raise it, or the noise multiplier"
            )

    @classmethod
    def without_privacy(cls, rounds: int, steps_per_round: int = 1) -> "PrivacyPlan":
        """The plan of a run that asks for no differential privacy, on fixed-size batches."""
        return cls("none", SamplerSpec("fixed", (), steps_per_round), rounds)

    @classmethod
    def for_examples(
        cls,
        examples: Sequence[int],
        *,
        expected_batch: float | Sequence[float],
        steps_per_round: int,
        rounds: int,
        clip_norm: float,
        noise_multiplier: float,
        delta: float,
        unit: Literal["example", "user"] = "example",
        period: int = 1,
        **settings: Any,
    ) -> "PrivacyPlan":
        """The plan of clouds that each run DP-SGD on their own examples, or users.

        Args:
            examples: N_c, the number of training examples (or users) of each cloud (public).
            expected_batch: mean size of the Poisson sample of one step, in every cloud or in each
                (public): a cloud's rate is its own over its N_c, and epsilon that of the largest.
            steps_per_round: local steps per round.
            rounds: rounds planned.
            clip_norm: l2 bound on one example's gradient.
            noise_multiplier: noise over `clip_norm`, on the sum of one step.
            delta: see `PrivacyPlan`.
            unit: what one of the N_c is.
            period: a turn comes to each every so many steps; see `SamplerSpec`.
            settings: further attributes of `PrivacyPlan`.

        Raises:
            UserError: a cloud has no example or fewer than the expected batch in one of its
                groups; as `PrivacyPlan`.
            Refused: as `PrivacyPlan`.
        """
        if any(count < 1 for count in examples) or not examples:
            raise UserError(f"every cloud needs at least one {unit}, got {tuple(examples)}")
        return cls(
            unit=unit,
            sampler=SamplerSpec.for_batches(
                examples, expected_batch, steps_per_round, period, f"{unit}s"
            ),
            rounds=rounds,
            units=tuple(examples),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            delta=delta,
            **settings,
        )

    @classmethod
    def for_clients(
        cls,
        clients: int,
        *,
        rounds: int,
        clip_norm: float,
        noise_multiplier: float,
        delta: float,
        rate: float = 1.0,
        period: int = 1,
        **settings: Any,
    ) -> "PrivacyPlan":
        """The plan of noise on the sum of clipped updates.

        Args:
            clients: number of clients that may take part.
            rounds: rounds planned.
            clip_norm: l2 bound on one cloud's update.
            noise_multiplier: noise over `clip_norm`, on the sum of one round.
            delta: see `PrivacyPlan`.
            rate: probability with which a client takes part in a round in which it is its turn; 1
                is full participation.
            period: a turn comes to each client every so many rounds; see `SamplerSpec`.
            settings: further attributes of `PrivacyPlan`.

        Raises:
            UserError: as `PrivacyPlan` and `SamplerSpec`.
            Refused: as `PrivacyPlan`.
        """
        return cls(
            unit="client",
            sampler=SamplerSpec("full" if rate == 1.0 else "poisson", (rate,), period=period),
            rounds=rounds,
            units=(clients,),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            delta=delta,
            **settings,
        )

    def event(self, rounds: int | None = None, cloud: int | None = None) -> Any:
        """The run's `dp_accounting.DpEvent`, for an accountant of the plan's neighbours.

        That is `NeighboringRelation.REPLACE_ONE` for adjacency "replace" and `ADD_OR_REMOVE_ONE`
        for the other. Integer noise has none: `UnsupportedDpEvent`.

        Args:
            rounds: after how many rounds; the planned ones when None.
            cloud: index of the cloud whose examples it is about; the one with the highest rate
                when None. The sum over "client" units has only cloud 0.
        """
        import dp_accounting as dp

        rounds = self._checked(rounds)
        if self.unit == "none":
            return dp.NonPrivateDpEvent()
        rate = max(self.sampler.rates) if cloud is None else self.sampler.rates[cloud]
        return spent.event(self, rate, rounds * self.sampler.steps_per_round)

    def _checked(self, rounds: int | None) -> int:
        rounds = self.rounds if rounds is None else rounds
        if rounds < 0:
            raise UserError(f"rounds must be zero or more, got {rounds}")
        if self.correlation is not None and rounds > self.rounds:
            raise UserError(
                f"correlated noise is made for the {self.rounds} rounds of the plan, got {rounds}; "
                "plan more rounds"
            )
        return rounds

    def epsilon(self, rounds: int | None = None) -> float | None:
        """Epsilon after `rounds` rounds (the planned ones when None); None for unit "none".

        The largest over the clouds: epsilon grows with the sampling rate. `inf` when nothing
        finite can be certified; use `report` for what is to be shown.
        """
        rounds = self._checked(rounds)
        if self.unit == "none":
            return None
        return spent.epsilon(self, max(self.sampler.rates), rounds * self.sampler.steps_per_round)

    def epsilon_per_cloud(
        self, rounds: int | None = None, steps: Sequence[int] | None = None
    ) -> tuple[float, ...] | None:
        """Epsilon of the examples of each cloud, or of each client; None without unit.

        Args:
            rounds: after how many rounds; the planned ones when None.
            steps: how many steps each cloud (or client) has really taken part in, where that is
                less: it was offline, or takes fewer local steps. Who was is public. With turns they
                count as if all were turns of one unit; where correlated noise reaches from turn to
                turn they count only if there are none.
        """
        rounds = self._checked(rounds)
        if self.unit == "none":
            return None
        count = self.units[0] if self.unit == "client" else len(self.units)
        rates = self.sampler.rates * count if self.unit == "client" else self.sampler.rates
        most = rounds * self.sampler.steps_per_round
        taken = [most] * count if steps is None else [min(own, most) for own in steps]
        if len(taken) != count:
            raise UserError(f"{count} numbers of steps are needed, one a {self.unit}, got {taken}")
        return tuple(
            spent.epsilon(self, rate, most, taken=own)
            for rate, own in zip(rates, taken, strict=True)
        )

    @property
    def allowed_rounds(self) -> int:
        """Rounds that stay within the budget, at most the planned ones."""
        return self.rounds if self.budget is None else self.rounds_within(self.budget)

    def rounds_within(self, budget: float, most: int | None = None) -> int:
        """The most rounds, up to the planned ones or `most`, whose epsilon is at most `budget`.

        Beyond the planned rounds only independent noise can be asked about.
        """
        low, high = 0, (self.rounds if most is None else most) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if (self.epsilon(middle) or 0.0) <= budget:
                low = middle
            else:
                high = middle
        return low

    def report(self, rounds: int | None = None) -> EpsilonReport:
        """The epsilon to show after `rounds` rounds, or the reason why none is shown."""
        rounds = self._checked(rounds)
        value = self.epsilon(rounds)
        reason = None
        if value is None:
            reason = "no differential privacy was asked for"
        elif not math.isfinite(value):
            value = None
            reason = spent.why_none(self)
        return EpsilonReport(value, self.delta, reason, self.unit, rounds)

    def noise_for(self, target_epsilon: float) -> "PrivacyPlan":
        """This plan with the smallest noise (to 0.1 %) that keeps the planned rounds in budget.

        Raises:
            UserError: the target is not positive and finite, there is no unit, or no noise
                multiplier up to 10^4 reaches the target.
        """
        if self.unit == "none":
            raise UserError('unit "none" has no epsilon to aim for; set it to example or client')
        if not 0 < target_epsilon < math.inf:
            raise UserError(f"target epsilon must be positive and finite, got {target_epsilon:g}")
        rate = max(self.sampler.rates)

        def epsilon(noise: float, interval: float | None) -> float:
            return spent.epsilon(self._with_noise(noise), rate, self.steps, interval)

        noise = accounting.least_noise(epsilon, target_epsilon)
        if noise is None:
            raise UserError(
                f"no noise reaches epsilon {target_epsilon:g} at delta {self.delta:g} over "
                f"{self.steps} steps; raise one of the first two or plan fewer rounds"
            )
        return dataclasses.replace(self._with_noise(noise), budget=self.budget)

    def _with_noise(self, noise: float, **changes: Any) -> "PrivacyPlan":
        """This plan with other noise, on the count of an adaptive clip norm as on the sum."""
        adaptive = self.adaptive
        if adaptive is not None:
            stddev = adaptive.count_stddev * noise / self.noise_multiplier
            adaptive = dataclasses.replace(adaptive, count_stddev=stddev)
        changes |= {"noise_multiplier": noise, "adaptive": adaptive, "budget": None}
        return dataclasses.replace(self, **changes)

    def epsilon_table(
        self,
        noise_multipliers: Sequence[float],
        rounds: Sequence[int],
        rates: Sequence[float] = (1.0,),
    ) -> tuple[EpsilonRow, ...]:
        """Reports for all noise multipliers, rates and rounds, the rest as in this plan.

        Args:
            noise_multipliers: in place of the plan's.
            rounds: in place of the plan's; beyond those only for independent noise.
            rates: factors on the plan's rates; those that lead above 1 are left out.

        Raises:
            Refused: a noise multiplier is not positive, as for a plan.
        """
        if self.unit == "none":
            return ()
        rows = []
        for factor in rates:
            rate = max(self.sampler.rates) * factor
            if rate > 1:
                continue
            sampler = self.sampler.scaled(factor)
            for noise in noise_multipliers:
                plan = self._with_noise(noise, sampler=sampler)
                rows += [EpsilonRow(noise, count, plan.report(count), rate) for count in rounds]
        return tuple(rows)

    def statement(self) -> str:
        """One paragraph: unit, neighbours, sampler, trust and what is released."""
        return statement(self)
