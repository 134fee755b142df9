"""The clients' integer noise as the plan and its accountant see it."""

from dataclasses import dataclass
from typing import Any

from .integer_noise import DiscreteGaussianShares, SkellamShares

Shares = DiscreteGaussianShares | SkellamShares


@dataclass(frozen=True)
class IntegerMechanism:
    """Integer noise on the coordinates of a secure sum of fixed-point messages.

    Formal guarantee: that of its shares, for clients whose integer vectors have an l2 norm of at
    most `sensitivity`, which the message codec enforces, rounding included.

    Attributes:
        shares: distribution and number of shares.
        sensitivity: l2 norm of one client's integers, in steps of the fixed point.
        dimension: integers of a message.
    """

    shares: Shares
    sensitivity: float
    dimension: int

    def stddev(self, noise_multiplier: float) -> float:
        """Standard deviation of the noise on a sum, in steps, when as few shares as may be come."""
        return noise_multiplier * self.sensitivity

    def epsilon(self, noise_multiplier: float, rounds: int, delta: float) -> float:
        """Epsilon after so many sums; infinity where none can be certified."""
        return self.shares.epsilon(
            self.stddev(noise_multiplier), self.sensitivity, self.dimension, rounds, delta
        )

    def event(self, noise_multiplier: float, rounds: int) -> Any:
        """`dp_accounting` has no event for it; `epsilon` is this package's own accounting."""
        import dp_accounting as dp

        del noise_multiplier, rounds
        return dp.UnsupportedDpEvent()
