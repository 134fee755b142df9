"""The two kinds of noise shares: how large a share is, where it comes from, what it certifies."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from fedjax_llm.errors import Refused, UserError

from . import accounting, tables, weights
from .tables import NoiseTable

# Above, tables outgrow 2^17 columns; below, the precision of the weights is not proven.
MAX_STDDEV, MIN_STDDEV = 2.0**12, 2.0**-10
# Sensitivity over noise from which every epsilon is in the thousands.
_LARGEST_RATIO = 64

Weights = Callable[[Fraction], list[int]]


@functools.lru_cache(maxsize=8)
def _table(weights_of: Weights, variance: Fraction) -> NoiseTable:
    return tables.build(weights_of(variance))


def _check_stddev(stddev: float) -> None:
    if not 0 < stddev < math.inf:
        raise UserError(
            f"noise of the sum must have a positive, finite standard deviation, got {stddev:g} "
            "steps; raise the noise multiplier or use more bits per parameter"
        )


@dataclass(frozen=True)
class _Shares(ABC):
    clients: int
    dropouts: int = 0
    colluding: int = 0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise UserError(f"noise shares need at least one client, got {self.clients}")
        for name in ("dropouts", "colluding"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.counted < 1:
            raise Refused(
                f"{self.dropouts} dropouts and {self.colluding} colluding of {self.clients} "
                "clients leave no share that hides anything; plan for fewer of either"
            )

    @property
    def counted(self) -> int:
        """Shares that are secret and arrive in the worst case."""
        return self.clients - self.dropouts - self.colluding

    def share_variance(self, total_variance: float) -> float:
        """Variance of one share, in the unit of `total_variance`: the total over `counted`."""
        return total_variance / self.counted

    def sampler(self, total_stddev_in_steps: float) -> NoiseTable:
        """The table that every client draws its share from; the last few are remembered.

        Args:
            total_stddev_in_steps: sigma, which the sum of the counted shares promises.

        Raises:
            UserError: sigma is not positive and finite, or a share's standard deviation is not in
                [2^-10, 2^12] steps.
        """
        _check_stddev(total_stddev_in_steps)
        variance = Fraction(total_stddev_in_steps) ** 2 / self.counted
        share = total_stddev_in_steps / math.sqrt(self.counted)
        if variance > MAX_STDDEV**2:
            raise UserError(
                f"a noise share of standard deviation {share:.6g} steps is more than a table "
                f"holds ({MAX_STDDEV:g}); use coarser fixed point, that is fewer bits"
            )
        if variance < MIN_STDDEV**2:
            raise UserError(
                f"a noise share of standard deviation {share:.6g} steps is below 2^-10; use finer "
                "fixed point, that is more bits, or more noise"
            )
        return _table(self._weights(), variance)

    def sum_bound(self, max_int: int, table: NoiseTable) -> int:
        """Largest absolute value of a coordinate of the sum, for sizing a modulus.

        Each summand is at most max_int + table.bound, in exact integers; int32 holds that, because
        a table's bound is at most 2^16 and `max_int` below 2^30.
        """
        return self.clients * (max_int + table.bound)

    def epsilon(
        self,
        total_stddev_in_steps: float,
        l2_sensitivity_in_steps: float,
        dimension: int,
        rounds: int,
        delta: float,
    ) -> float:
        """Epsilon of `rounds` noised sums, under the assumptions of this package.

        Formal guarantee: an upper bound, up to float64 rounding, on the epsilon of releasing
        every sum, for shares drawn from `sampler`'s table. Divergences add up over rounds, also
        if later messages depend on earlier sums; the d n T draws that privacy rests on are each
        within 2^-159 in total variation of the ideal ones, for which delta is reduced; see
        `accounting.certified_epsilon`.

        | input | epsilon |
        |---|---|
        | rounds 0, or sensitivity 0 | 0 |
        | sigma below Delta_2 / 64 or 2^-10 | inf |
        | discrete Gaussian shares below 1/2 step | inf |
        | (1 + e^epsilon) d n T 2^-159 above delta / 2 | inf |
        | more clients than planned dropouts lost, or colluding | no guarantee |

        Args:
            total_stddev_in_steps: sigma.
            l2_sensitivity_in_steps: Delta_2, `MessageCodec.max_norm` over the step.
            dimension: d, at least 1.
            rounds: T.
            delta: in (0, 1).

        Raises:
            UserError: a value is outside its range.
        """
        _check_stddev(total_stddev_in_steps)
        if not 0 <= l2_sensitivity_in_steps < math.inf:
            raise UserError(
                "l2 sensitivity must be finite and not negative, got "
                f"{l2_sensitivity_in_steps:g} steps; set a clip norm"
            )
        if dimension < 1 or rounds < 0:
            raise UserError(
                f"dimension must be at least 1 and rounds at least 0, got {dimension} and {rounds}"
            )
        if not 0 < delta < 1:
            raise UserError(f"delta must be in (0, 1), got {delta:g}")
        if rounds == 0 or l2_sensitivity_in_steps == 0:
            return 0.0
        if not max(MIN_STDDEV, l2_sensitivity_in_steps / _LARGEST_RATIO) <= total_stddev_in_steps:
            return math.inf
        orders_O = accounting.ORDERS_O
        divergence_O = self._divergence(
            orders_O, total_stddev_in_steps, l2_sensitivity_in_steps, dimension
        )
        draws = dimension * self.counted * rounds
        return accounting.certified_epsilon(
            orders_O, rounds * divergence_O, delta, draws * tables.MAX_TOTAL_VARIATION
        )

    @abstractmethod
    def _weights(self) -> Weights: ...

    @abstractmethod
    def _divergence(
        self, orders_O: accounting.Floats, stddev: float, l2_sensitivity: float, dimension: int
    ) -> accounting.Floats: ...


@dataclass(frozen=True)
class DiscreteGaussianShares(_Shares):
    """Shares from the discrete Gaussian, arXiv:2102.06387.

    Formal guarantee: the sum of at least `counted` shares has the divergences of
    `accounting.discrete_gaussian_divergence`. The promised variance is the parameter sigma^2; the
    variance of a discrete Gaussian is below its parameter, which the theorem accounts for: by 14
    percent at 1/2 step, by 2 10^-7 at one step, by less than 10^-16 from 1.5 steps on.

    | plan | outcome |
    |---|---|
    | share of less than 1/2 step | epsilon inf; use finer fixed point or Skellam shares |
    | dropouts + colluding >= clients | Refused |
    | fewer than one client, negative counts | UserError |

    Attributes:
        clients: N, asked in every round.
        dropouts: most of them that may be lost.
        colluding: most of them that may give their shares away.
    """

    def _weights(self) -> Weights:
        return weights.discrete_gaussian

    def _divergence(
        self, orders_O: accounting.Floats, stddev: float, l2_sensitivity: float, dimension: int
    ) -> accounting.Floats:
        return accounting.discrete_gaussian_divergence(
            orders_O, stddev, self.counted, l2_sensitivity, dimension
        )


@dataclass(frozen=True)
class SkellamShares(_Shares):
    """Shares from the symmetric Skellam distribution, arXiv:2110.04995.

    Formal guarantee: the sum of k shares is Skellam of variance k times a share's, so that of at
    least `counted` shares has the divergences of `accounting.skellam_divergence`, whatever the
    number of clients.

    | plan | outcome |
    |---|---|
    | share of less than 1/2 step | certified like any other |
    | dropouts + colluding >= clients | Refused |
    | fewer than one client, negative counts | UserError |

    Attributes:
        clients: N, asked in every round.
        dropouts: most of them that may be lost.
        colluding: most of them that may give their shares away.
    """

    def _weights(self) -> Weights:
        return weights.skellam

    def _divergence(
        self, orders_O: accounting.Floats, stddev: float, l2_sensitivity: float, dimension: int
    ) -> accounting.Floats:
        return accounting.skellam_divergence(orders_O, stddev, l2_sensitivity, dimension)
