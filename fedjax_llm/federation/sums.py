"""Which sum a federation uses. Training never knows; only the road between the clouds differs."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.secure.fixed_point import FixedPoint
from fedjax_llm.secure.sums import SecureSum


@dataclass(frozen=True)
class Plain:
    """The messages are added on the devices, inside the program of the round; nothing is hidden."""

    def statement(self) -> str:
        """Who sees what."""
        return "no encryption: the server sees every cloud's update"


@dataclass(frozen=True)
class Threshold:
    """The messages leave the clouds encrypted; `threshold` of them together decrypt the sum only.

    Attributes:
        threshold: clouds that must take part in a decryption; at least two.
    """

    threshold: int

    def open(self, clouds: Sequence[str], size: int, fixed_point: FixedPoint) -> SecureSum:
        """Runs the key ceremony among `clouds` for messages of `size` integers."""
        from fedjax_llm.secure.threshold import ThresholdSum

        return ThresholdSum(
            tuple(clouds),
            threshold=self.threshold,
            count=size,
            max_abs=fixed_point.max_int,
            summands=len(clouds),
        )


SumMode = Plain | Threshold
