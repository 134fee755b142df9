"""The privacy plan: unit, sampler, clip norm, noise and accountant bound into one object."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedjax_llm.errors import Refused, UserError

from . import accounting, refusals
from .clipping import AdaptiveClip
from .correlated import Correlation
from .epsilon import EpsilonReport, EpsilonRow
from .integer_mechanism import IntegerMechanism
from .sampler import SamplerSpec, Unit
from .statement import statement
from .weights import Weights

Trust = Literal["local", "central", "distributed"]
Adjacency = Literal["add-remove", "replace"]


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run promises about one privacy unit, and what it must do to keep the promise.

    Formal guarantee: if every mechanism of the run is the one described here (the sampler of
    `sampler`, contributions of l2 norm at most `clip_norm`, noise of standard deviation
    `noise_stddev` on their sum, hanging together over the steps as `correlation` says), what
    `statement` says is released after r rounds is (`epsilon(r)`, `delta`)-differentially private
    for neighbours by `adjacency`, in real arithmetic. A plan for which that cannot be certified
    cannot be made: the constructor refuses.

    - unit "example": every local step of cloud c Poisson-samples its examples at rate
      q_c = expected batch / N_c, clips each example's gradient, sums, adds noise, and divides by
      the expected batch, a public constant. N_c is public and does not change between neighbours.
      Clouds hold disjoint examples, so epsilon is the largest over the clouds.
    - unit "user": the same with one user's examples in one cloud in place of one example: what is
      clipped is the gradient of the user's mean loss.
    - unit "client": the whole update of a client is clipped; noise is added to the sum over clients
      and the result divided by their expected number. Who adds it is the trust: "central", the
      server after the sum; "distributed", the clients together, integers before the sum, so that
      the server never sees it without; "local", each client the whole of it.
    - unit "none": nothing is promised; clip norm and noise are not used.

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

    Attributes:
        unit: whose participation is hidden.
        sampler: what the accountant assumes of the training code; see `check_sampler`.
        rounds: rounds planned; at least one.
        units: number of privacy units: per cloud for units "example" and "user", the number of
            clients (in one entry) for "client"; empty for "none".
        clip_norm: l2 bound on a unit's contribution to one sum, and so the sum's sensitivity.
        noise_multiplier: standard deviation of the noise over `clip_norm`.
        delta: probability left outside the guarantee.
        weights: how clouds are weighted in the mean. "uniform" stands for all weights that are
            public and at most 1. "examples" is allowed with unit "example", where N_c is public;
            with unit "client" a cloud's size is its secret. "tokens" and "loss" follow from the
            texts without noise. "loss-bounded" is a weight of at most 1 that follows from the
            client's own data alone, and its sum is divided by a public number: it is allowed with
            unit "client", where the clip comes after the weight. "result" follows from the
            noised update, which is private with unit "example", and has no bound, which unit
            "client" would need.
        packed: whether a row of training data may hold several examples.
        correlation: how the noise of different steps hangs together; None is independent noise.
        trust: who adds the noise; by the unit if None.
        adjacency: "add-remove" a unit, or "replace" one, which is twice as far apart.
        adaptive: the clip norm follows a private quantile, beginning with `clip_norm`, and
            `noise_multiplier` is that of sum and count together; None keeps the clip norm.
        integer: noise on the integers of a secure sum, for trust "distributed" and "local".
        generator: where noise and samples come from: the run's "seed", so that runs repeat, or the
            operating "system", so that nobody can.
        error_feedback: whether what a compressor dropped after the clip is added to later messages.
        clip_norm_from: "public", or "data" where the clip norm was tuned on the private data.
        budget: epsilon that the run may not exceed: it stops before; None is no budget.
    """

    unit: Unit
    sampler: SamplerSpec
    rounds: int
    units: tuple[int, ...] = ()
    clip_norm: float = math.inf
    noise_multiplier: float = 0.0
    delta: float = 0.0
    weights: Weights = "uniform"
    packed: bool = False
    correlation: Correlation | None = None
    trust: Trust | None = None
    adjacency: Adjacency = "add-remove"
    adaptive: AdaptiveClip | None = None
    integer: IntegerMechanism | None = None
    generator: Literal["seed", "system"] = "seed"
    error_feedback: bool = False
    clip_norm_from: Literal["public", "data"] = "public"
    budget: float | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("unit", Unit), ("weights", Weights), ("adjacency", Adjacency)):
            if getattr(self, name) not in get_args(kinds):
                raise UserError(
                    f"{'privacy unit' if name == 'unit' else name} must be one of "
                    f"{', '.join(get_args(kinds))}; got {getattr(self, name)}"
                )
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")
        if self.trust is None:
            object.__setattr__(self, "trust", "central" if self.unit == "client" else "local")
        if self.unit == "none":
            if self.noise_multiplier != 0:
                raise UserError(
                    f"noise multiplier {self.noise_multiplier:g} without a privacy unit promises "
                    "nothing; set the unit to example or client, or the noise to 0"
                )
            if self.budget is not None:
                raise UserError(
                    f"budget {self.budget:g} without a privacy unit would never be spent; set the "
                    "unit to example, user or client, or leave the budget out"
                )
            return
        if not 0 < self.clip_norm < math.inf:
            raise UserError(f"clip_norm must be positive and finite, got {self.clip_norm:g}")
        if any(count < 1 for count in self.units) or not self.units:
            raise UserError(f"every cloud needs at least one {self.unit}, got {self.units}")
        refusals.check(self)
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
        expected_batch: float,
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
            expected_batch: mean size of the Poisson sample of one step, the same in every cloud.
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
        if period < 1:
            raise UserError(f"the period of sampling must be at least 1, got {period}")
        most = min(examples) / period
        if not 0 < expected_batch <= most:
            among = f" divided by the period {period}" if period > 1 else ""
            raise UserError(
                f"expected batch must be above 0 and at most {most:g}, the {unit}s of the "
                f"smallest cloud{among}, got {expected_batch:g}: a sampling rate cannot exceed 1"
            )
        rates = tuple(min(1.0, expected_batch * period / count) for count in examples)
        kind: Literal["full", "poisson"] = "full" if set(rates) == {1.0} else "poisson"
        return cls(
            unit=unit,
            sampler=SamplerSpec(kind, rates, steps_per_round, period),
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

    @property
    def steps(self) -> int:
        """Mechanisms of the planned rounds, whoever's turn it is."""
        return self.rounds * self.sampler.steps_per_round

    @property
    def sensitivity(self) -> float:
        """l2 change of one sum when one unit is added, removed or replaced; inf without a unit."""
        if self.unit == "none":
            return math.inf
        return self.clip_norm * (2 if self.adjacency == "replace" else 1)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of each coordinate of the noise on a sum (not on a mean).

        With correlated noise that of the independent draws which it is made of, with an adaptive
        clip norm that of the first step.
        """
        if self.unit == "none":
            return 0.0
        if self.adaptive is not None:
            return self.adaptive.sum_noise_multiplier(self.noise_multiplier) * self.clip_norm
        return self.noise_multiplier * self.clip_norm

    @property
    def expected_sizes(self) -> tuple[float, ...]:
        """What the noised sum is divided by: q_c N_c / b per cloud, or q / b times the clients.

        Public constants; dividing by the realised size would release it. Empty without a unit.
        """
        if self.unit == "none":
            return ()
        return tuple(
            rate * count / self.sampler.period
            for rate, count in zip(self.sampler.rates, self.units, strict=True)
        )

    def check_sampler(self, actual: SamplerSpec) -> None:
        """Refuses a run that does not sample as the plan accounts.

        Args:
            actual: what the training code really does, built from its own constants.

        Raises:
            Refused: kind, rates or steps per round differ, and a unit is promised something.
        """
        if self.unit == "none" or actual == self.sampler:
            return
        raise Refused(
            f"the run samples by {actual.describe()} but the plan accounts for "
            f"{self.sampler.describe()}; its epsilon would be wrong"
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
        steps = rounds * self.sampler.steps_per_round
        if steps == 0:
            return dp.NoOpDpEvent()
        if self.integer is not None:
            return self.integer.event(self.noise_multiplier, steps)
        rate = max(self.sampler.rates) if cloud is None else self.sampler.rates[cloud]
        rate, noise, count = self._gaussians(rate, steps)
        step: Any = dp.GaussianDpEvent(noise)
        if rate < 1:
            step = dp.PoissonSampledDpEvent(rate, step)
        return dp.SelfComposedDpEvent(step, count)

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

    def _gaussians(
        self, rate: float, steps: int, taken: int | None = None
    ) -> tuple[float, float, int]:
        """Rate, noise multiplier and number of the Gaussian mechanisms that the steps amount to.

        Args:
            rate: of a unit in its turn.
            steps: of the run so far.
            taken: steps that the unit's cloud took part in, where those are fewer. They may all be
                turns of the same unit.
        """
        period = self.sampler.period
        if self.correlation is None or self.correlation.bands <= period:
            turns = self.sampler.turns(steps)
            return rate, self.noise_multiplier, turns if taken is None else min(turns, taken)
        # Sampling at random only takes participations away (the guarantee holds for each outcome of
        # it); that it also hides is certified for no noise that reaches the unit's next turn.
        return 1.0, self.noise_multiplier / self.correlation.sensitivity(period, steps), 1

    def _epsilon(
        self,
        rate: float,
        steps: int,
        interval: float | None = None,
        taken: int | None = None,
    ) -> float:
        if steps == 0 or taken == 0:
            return 0.0
        if self.integer is not None:
            count = steps if taken is None else taken
            return self.integer.epsilon(self.noise_multiplier, count, self.delta)
        return accounting.epsilon(
            *self._gaussians(rate, steps, taken),
            self.delta,
            interval,
            replace=self.adjacency == "replace",
        )

    def epsilon(self, rounds: int | None = None) -> float | None:
        """Epsilon after `rounds` rounds (the planned ones when None); None for unit "none".

        The largest over the clouds: epsilon grows with the sampling rate. `inf` when nothing
        finite can be certified; use `report` for what is to be shown.
        """
        rounds = self._checked(rounds)
        if self.unit == "none":
            return None
        return self._epsilon(max(self.sampler.rates), rounds * self.sampler.steps_per_round)

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
            self._epsilon(rate, most, taken=own) for rate, own in zip(rates, taken, strict=True)
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
            reason = self._why_none()
        return EpsilonReport(value, self.delta, reason, self.unit, rounds)

    def _why_none(self) -> str:
        if self.integer is not None:
            return (
                f"integer noise of {self.integer.stddev(self.noise_multiplier):g} steps certifies "
                "none; use more noise, or finer fixed point (more bits)"
            )
        _, noise, _ = self._gaussians(max(self.sampler.rates), self.steps)
        if noise < accounting.MIN_NOISE_MULTIPLIER:
            over = "" if noise == self.noise_multiplier else f" {self.noise_multiplier:g}, that is"
            return (
                f"the noise multiplier{over} {noise:.3g} over what a unit can move, is below "
                f"{accounting.MIN_NOISE_MULTIPLIER:g}, too small to account for"
                if over
                else f"the noise multiplier {noise:g} is below "
                f"{accounting.MIN_NOISE_MULTIPLIER:g}, too small to account for"
            )
        return f"delta {self.delta:g} is below what the accountant can resolve"

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
            return self._with_noise(noise)._epsilon(rate, self.steps, interval)

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
            own = tuple(rate * factor for rate in self.sampler.rates)
            if max(own) > 1:
                continue
            kind: Literal["full", "poisson"] = "full" if set(own) == {1.0} else "poisson"
            sampler = dataclasses.replace(self.sampler, kind=kind, rates=own)
            for noise in noise_multipliers:
                plan = self._with_noise(noise, sampler=sampler)
                rows += [EpsilonRow(noise, count, plan.report(count), max(own)) for count in rounds]
        return tuple(rows)

    def statement(self) -> str:
        """One paragraph: unit, neighbours, sampler, trust and what is released."""
        return statement(self)
