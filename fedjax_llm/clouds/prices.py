"""What a cloud costs: hours of its machines, and bytes that leave it.

Providers price data by where it goes and by volume: what comes in is free, what goes out is billed
per GB in tiers, each of which has its own price for the bytes within it.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, get_args

from fedjax_llm.errors import UserError

Destination = Literal["same-region", "same-continent", "other-continent", "internet"]
DESTINATIONS: tuple[Destination, ...] = get_args(Destination)

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Egress:
    """The price of bytes that leave for one class of destinations.

    Attributes:
        dollars: per unit, for each tier.
        above: units sent before from which on each tier's price applies: 0 first, rising.
        unit_bytes: what the provider calls a GB: 10^9 bytes, or 2^30 where it says GiB.

    Raises:
        UserError: a price that is negative or not finite, or tiers that do not rise from 0.
    """

    dollars: tuple[float, ...] = (0.0,)
    above: tuple[float, ...] = (0.0,)
    unit_bytes: int = GB

    def __post_init__(self) -> None:
        for price in self.dollars:
            if not 0 <= price < math.inf:
                raise UserError(f"egress price must be zero or more dollars per GB, got {price:g}")
        rising = all(a < b < math.inf for a, b in pairwise(self.above))
        if len(self.dollars) != len(self.above) or self.above[:1] != (0.0,) or not rising:
            raise UserError(
                f"egress tiers must begin at 0 and rise, one price each, got {list(self.above)} "
                f"with {len(self.dollars)} prices"
            )
        if self.unit_bytes not in (GB, GIB):
            raise UserError(f"a GB has {GB} bytes or {GIB}, got {self.unit_bytes}")

    def cost(self, size: float, before: float = 0.0) -> float:
        """Dollars for `size` bytes.

        Args:
            size: bytes that leave, zero or more.
            before: bytes that left in the same billing month before them.

        >>> Egress((0.0, 0.09), (0.0, 100.0)).cost(101e9)
        0.09
        """
        if len(self.dollars) == 1:
            return size / self.unit_bytes * self.dollars[0]
        return self._until((before + size) / self.unit_bytes) - self._until(
            before / self.unit_bytes
        )

    @cached_property
    def _corners(self) -> list[float]:
        """Dollars for all units below each tier."""
        spans = (b - a for a, b in pairwise(self.above))
        costs = (span * price for span, price in zip(spans, self.dollars, strict=False))
        return list(accumulate(costs, initial=0.0))

    def _until(self, units: float) -> float:
        tier = bisect_right(self.above, units) - 1
        return self._corners[tier] + (units - self.above[tier]) * self.dollars[tier]


FREE = Egress()


@dataclass(frozen=True)
class Prices:
    """Of one cloud; by default everything is free.

    Attributes:
        dollars_per_hour: of one machine, which may hold several accelerators.
        machines: how many are rented.
        same_region: egress within the region, between its zones.
        same_continent: egress to another region of the same provider on the same continent.
        other_continent: egress to a region of the same provider on another continent.
        internet: egress to another provider or to anywhere else.
        destination: the class of the server, where uploads go.

    Raises:
        UserError: an hourly price that is negative or not finite, or no machine.
    """

    dollars_per_hour: float = 0.0
    machines: int = 1
    same_region: Egress = FREE
    same_continent: Egress = FREE
    other_continent: Egress = FREE
    internet: Egress = FREE
    destination: Destination = "internet"

    def __post_init__(self) -> None:
        if not 0 <= self.dollars_per_hour < math.inf:
            raise UserError(
                f"dollars_per_hour must be zero or more and finite, got {self.dollars_per_hour:g}"
            )
        if self.machines < 1:
            raise UserError(f"machines must be at least 1, got {self.machines}")
        if self.destination not in DESTINATIONS:
            valid = ", ".join(DESTINATIONS)
            raise UserError(f"destination must be one of {valid}, got {self.destination!r}")

    @cached_property
    def egress(self) -> Egress:
        """To the class of the server."""
        found: Egress = getattr(self, self.destination.replace("-", "_"))
        return found

    def dollars(self, seconds: float, bytes_out: float, bytes_before: float = 0.0) -> float:
        """What a span of time and what left in it cost.

        Args:
            seconds: for which the machines are rented, whether they train, send or wait. Billed
                to the fraction of a second; providers round up to one second or one minute.
            bytes_out: that left for the server, retransmissions included.
            bytes_before: that left in the same billing month before.

        >>> Prices(dollars_per_hour=36.0, internet=Egress((0.09,))).dollars(100.0, 10**10)
        1.9
        """
        rent = self.dollars_per_hour * self.machines * seconds / 3600
        return rent + self.egress.cost(bytes_out, bytes_before)
