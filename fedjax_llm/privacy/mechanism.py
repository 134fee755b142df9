"""What a run does to protect one privacy unit: sampler, clip norm and noise in one object."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedjax_llm.errors import Refused, UserError

from . import refusals
from .clipping import AdaptiveClip
from .correlated import Correlation
from .integer_mechanism import IntegerMechanism
from .sampler import SamplerSpec, Unit
from .weights import Weights

Trust = Literal["local", "central", "distributed"]
Adjacency = Literal["add-remove", "replace"]


@dataclass(frozen=True)
class Mechanism:
    """Whose participation a run hides, and by what; `PrivacyPlan` says what that amounts to.

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

    Raises:
        UserError, Refused: see the table of `PrivacyPlan`.
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
