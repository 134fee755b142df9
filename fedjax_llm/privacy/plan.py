"""The privacy plan: unit, sampler, clip norm, noise and accountant bound into one object."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedjax_llm.errors import Refused, UserError

from . import accounting
from .epsilon import EpsilonReport, EpsilonRow
from .sampler import SamplerSpec, Unit

Weights = Literal["uniform", "examples", "tokens", "loss", "loss-bounded", "result"]

# What each way to weigh clients follows from, where that is not public or noised.
_UNCERTIFIED = {
    ("client", "examples"): "weights by number of examples depend on the data of the client",
    ("client", "tokens"): "weights by number of tokens depend on the data of the client",
    ("client", "loss"): "weights by loss have no bound and depend on the data of the client",
    ("client", "result"): "weights by the norm of a result have no bound and depend on the client",
    ("example", "tokens"): "weights by number of tokens follow from the examples without noise",
    ("example", "loss"): "weights by loss follow from the examples without noise",
    ("example", "loss-bounded"): "weights by loss follow from the examples without noise",
}


def check_weights(unit: Unit, weights: Weights) -> None:
    """Refuses weights that follow from what a unit is to hide; see `PrivacyPlan`."""
    if (why := _UNCERTIFIED.get((unit, weights))) is not None:
        cure = "loss-bounded" if unit == "client" else "examples"
        raise Refused(f"{why} that unit {unit} is to hide; use uniform or {cure} weights")


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run promises about one privacy unit, and what it must do to keep the promise.

    Formal guarantee: if every mechanism of the run is the one described here (the sampler of
    `sampler`, contributions of l2 norm at most `clip_norm`, Gaussian noise of standard deviation
    `noise_stddev` on their sum), what `statement` says is released after r rounds is
    (`epsilon(r)`, `delta`)-differentially private for adding or removing one unit, in real
    arithmetic. A plan for which that cannot be certified cannot be made: the constructor refuses.

    - unit "example": every local step of cloud c Poisson-samples its examples at rate
      q_c = expected batch / N_c, clips each example's gradient, sums, adds noise, and divides by
      the expected batch, a public constant. N_c is public and does not change between neighbours.
      Clouds hold disjoint examples, so epsilon is the largest over the clouds.
    - unit "client": the whole update of a cloud is clipped; noise is added to the sum over clouds
      and the result divided by the expected number of clouds.
    - unit "none": nothing is promised; clip norm and noise are not used.

    | plan                                            | outcome   |
    |-------------------------------------------------|-----------|
    | sampler "fixed" with a unit                     | Refused   |
    | noise multiplier 0, negative or NaN with a unit | Refused   |
    | noise multiplier above 0 without a unit         | UserError |
    | delta outside (0, 1 / number of units)          | Refused   |
    | clip norm not positive and finite, with a unit  | UserError |
    | unit "client" weighted by examples, tokens, loss or result | Refused |
    | unit "example" weighted by tokens or loss, bounded or not | Refused |
    | unit "example" with packed rows                 | Refused   |
    | noise multiplier below 0.05                     | a plan whose reports give no epsilon |

    Attributes:
        unit: whose participation is hidden.
        sampler: what the accountant assumes of the training code; see `check_sampler`.
        rounds: rounds planned; at least one.
        units: number of privacy units: per cloud for unit "example", the number of clouds (in
            one entry) for "client"; empty for "none".
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

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise UserError(f"privacy unit must be none, example or client; got {self.unit}")
        if self.weights not in get_args(Weights):
            raise UserError(
                f"weights must be one of {', '.join(get_args(Weights))}; got {self.weights}"
            )
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")
        if self.unit == "none":
            if self.noise_multiplier != 0:
                raise UserError(
                    f"noise multiplier {self.noise_multiplier:g} without a privacy unit promises "
                    "nothing; set the unit to example or client, or the noise to 0"
                )
            return
        if not 0 < self.clip_norm < math.inf:
            raise UserError(f"clip_norm must be positive and finite, got {self.clip_norm:g}")
        if any(count < 1 for count in self.units) or not self.units:
            raise UserError(f"every cloud needs at least one {self.unit}, got {self.units}")
        self._refuse()

    def _refuse(self) -> None:
        unit, total = self.unit, sum(self.units)
        if self.sampler.kind == "fixed":
            raise Refused(
                f"fixed-size batches cannot be accounted as Poisson samples for unit {unit}; "
                "use the poisson sampler or full participation"
            )
        if not 0 < self.noise_multiplier < math.inf:
            raise Refused(
                f"noise multiplier {self.noise_multiplier:g} certifies no epsilon for unit {unit}; "
                'make it positive and finite, or ask for no privacy with unit "none"'
            )
        if not 0 < self.delta < 1 / total:
            raise Refused(
                f"delta must be above 0 and below 1/{total} (one over the number of {unit}s), "
                f"got {self.delta:g}: a larger one allows publishing a whole {unit}"
            )
        check_weights(unit, self.weights)
        if unit == "client" and (len(self.units) != 1 or len(self.sampler.rates) != 1):
            raise UserError("unit client takes one number of clients and one sampling rate")
        if unit == "client" and self.sampler.steps_per_round != 1:
            raise UserError("unit client sums once per round; steps per round must be 1")
        if unit == "example" and len(self.units) != len(self.sampler.rates):
            raise UserError(
                f"unit example needs one sampling rate for each cloud, got "
                f"{len(self.sampler.rates)} for {len(self.units)} clouds"
            )
        if unit == "example" and self.packed:
            raise Refused(
                "a packed row holds several examples and clipping it bounds none of them alone; "
                "switch packing off with unit example"
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
        weights: Weights = "uniform",
        packed: bool = False,
    ) -> "PrivacyPlan":
        """The plan of clouds that each run DP-SGD on their own examples.

        Args:
            examples: N_c, the number of training examples of each cloud (public).
            expected_batch: mean size of the Poisson sample of one step, the same in every cloud.
            steps_per_round: local steps per round.
            rounds: rounds planned.
            clip_norm: l2 bound on one example's gradient.
            noise_multiplier: noise over `clip_norm`, on the sum of one step.
            delta: see `PrivacyPlan`.
            weights: see `PrivacyPlan`.
            packed: see `PrivacyPlan`.

        Raises:
            UserError: a cloud has no example or fewer than the expected batch; as `PrivacyPlan`.
            Refused: as `PrivacyPlan`.
        """
        if any(count < 1 for count in examples) or not examples:
            raise UserError(f"every cloud needs at least one example, got {tuple(examples)}")
        if not 0 < expected_batch <= min(examples):
            raise UserError(
                f"expected batch must be above 0 and at most {min(examples)}, the examples of the "
                f"smallest cloud, got {expected_batch:g}: a sampling rate cannot exceed 1"
            )
        rates = tuple(expected_batch / count for count in examples)
        kind: Literal["full", "poisson"] = "full" if set(rates) == {1.0} else "poisson"
        return cls(
            unit="example",
            sampler=SamplerSpec(kind, rates, steps_per_round),
            rounds=rounds,
            units=tuple(examples),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            delta=delta,
            weights=weights,
            packed=packed,
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
        weights: Weights = "uniform",
    ) -> "PrivacyPlan":
        """The plan of a server that adds noise to the sum of clipped updates.

        Args:
            clients: number of clouds that may take part.
            rounds: rounds planned.
            clip_norm: l2 bound on one cloud's update.
            noise_multiplier: noise over `clip_norm`, on the sum of one round.
            delta: see `PrivacyPlan`.
            rate: probability with which a cloud takes part in a round; 1 is full participation.
            weights: see `PrivacyPlan`.

        Raises:
            UserError: as `PrivacyPlan` and `SamplerSpec`.
            Refused: as `PrivacyPlan`.
        """
        return cls(
            unit="client",
            sampler=SamplerSpec("full" if rate == 1.0 else "poisson", (rate,)),
            rounds=rounds,
            units=(clients,),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            delta=delta,
            weights=weights,
        )

    @property
    def sensitivity(self) -> float:
        """l2 change of one sum when one unit is added or removed; inf without a unit."""
        return self.clip_norm if self.unit != "none" else math.inf

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of each coordinate of the noise on a sum (not on a mean)."""
        return self.noise_multiplier * self.clip_norm if self.unit != "none" else 0.0

    @property
    def expected_sizes(self) -> tuple[float, ...]:
        """What the noised sum is divided by: q_c N_c per cloud, or q times the clients.

        Public constants; dividing by the realised size would release it. Empty without a unit.
        """
        if self.unit == "none":
            return ()
        return tuple(
            rate * count for rate, count in zip(self.sampler.rates, self.units, strict=True)
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
        """The run's `dp_accounting.DpEvent`.

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
        step: Any = dp.GaussianDpEvent(self.noise_multiplier)
        if rate < 1:
            step = dp.PoissonSampledDpEvent(rate, step)
        return dp.SelfComposedDpEvent(step, rounds * self.sampler.steps_per_round)

    def _checked(self, rounds: int | None) -> int:
        rounds = self.rounds if rounds is None else rounds
        if rounds < 0:
            raise UserError(f"rounds must be zero or more, got {rounds}")
        return rounds

    def _epsilon(self, rate: float, rounds: int) -> float:
        steps = rounds * self.sampler.steps_per_round
        return accounting.epsilon(rate, self.noise_multiplier, steps, self.delta)

    def epsilon(self, rounds: int | None = None) -> float | None:
        """Epsilon after `rounds` rounds (the planned ones when None); None for unit "none".

        The largest over the clouds: epsilon grows with the sampling rate. `inf` when nothing
        finite can be certified; use `report` for what is to be shown.
        """
        rounds = self._checked(rounds)
        if self.unit == "none":
            return None
        return self._epsilon(max(self.sampler.rates), rounds)

    def epsilon_per_cloud(self, rounds: int | None = None) -> tuple[float, ...] | None:
        """Epsilon of the examples of each cloud; of the one group of clients; None without unit."""
        rounds = self._checked(rounds)
        if self.unit == "none":
            return None
        return tuple(self._epsilon(rate, rounds) for rate in self.sampler.rates)

    def report(self, rounds: int | None = None) -> EpsilonReport:
        """The epsilon to show after `rounds` rounds, or the reason why none is shown."""
        rounds = self._checked(rounds)
        value = self.epsilon(rounds)
        reason = None
        if value is None:
            reason = "no differential privacy was asked for"
        elif not math.isfinite(value):
            value = None
            reason = (
                f"the noise multiplier {self.noise_multiplier:g} is below "
                f"{accounting.MIN_NOISE_MULTIPLIER:g}, too small to account for"
                if self.noise_multiplier < accounting.MIN_NOISE_MULTIPLIER
                else f"delta {self.delta:g} is below what the accountant can resolve"
            )
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
        steps = self.rounds * self.sampler.steps_per_round
        rate = max(self.sampler.rates)
        noise = accounting.noise_multiplier_for(target_epsilon, rate, steps, self.delta)
        if noise is None:
            raise UserError(
                f"no noise reaches epsilon {target_epsilon:g} at delta {self.delta:g} over {steps} "
                "steps; raise one of the first two or plan fewer rounds"
            )
        return dataclasses.replace(self, noise_multiplier=noise)

    def epsilon_table(
        self, noise_multipliers: Sequence[float], rounds: Sequence[int]
    ) -> tuple[EpsilonRow, ...]:
        """Reports for every pair of noise multiplier and rounds, the rest as in this plan.

        Raises:
            Refused: a noise multiplier is not positive, as for a plan.
        """
        if self.unit == "none":
            return ()
        plans = [dataclasses.replace(self, noise_multiplier=noise) for noise in noise_multipliers]
        return tuple(
            EpsilonRow(plan.noise_multiplier, count, plan.report(count))
            for plan in plans
            for count in rounds
        )

    def statement(self) -> str:
        """One paragraph: unit, neighbours, sampler, trust and what is released."""
        if self.unit == "none":
            return "No differential privacy: no differential privacy was asked for."
        mechanism = (
            f"Sampler: {self.sampler.describe()}. Contributions are clipped to an l2 norm of "
            f"{self.clip_norm:g} and Gaussian noise of standard deviation {self.noise_stddev:g} "
            "is added to their sum. Noise and samples follow from the run's seed, as in any "
            f"simulation: whoever knows the seed can take them off. {self.report()}."
        )
        if self.unit == "example":
            return (
                "Differential privacy per example. Neighbours: one training example of one cloud "
                "added or removed; the number of examples of each cloud is public. Trust: each "
                "cloud trusts itself alone, and its noised updates are private towards everyone, "
                "the server included. Released: the updates of every round and all that is "
                "computed from them. Not covered: losses (training and held-out), counts and "
                "timings of a cloud, which must stay in it, and people or texts with several "
                "examples. " + mechanism
            )
        secrecy = (
            "which clouds took part in a round must stay with the server, "
            if self.sampler.kind == "poisson"
            else ""
        )
        return (
            "Differential privacy per client. Neighbours: one client with all its data added or "
            "removed, that is a cloud, or one of the clients inside a cloud where it has several; "
            "the number of clients is public. Trust: the server sees the sum before noise "
            "and adds the noise; what it passes on is private towards the other clouds and the "
            f"public. Released: the global adapter of every round. Not covered: {secrecy}the "
            "messages themselves, and losses (training and held-out), counts (clipped and diverged "
            "updates too), timings of a cloud and the aggregation error. " + mechanism
        )
