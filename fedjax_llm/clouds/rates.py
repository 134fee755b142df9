"""A bandwidth over time: pieces of constant rate, integrated exactly.

B(t) is what a link can carry until t. A transfer of n megabits that starts at s is through at the
first t with B(t) = B(s) + n; B is piecewise linear, so t is found by binary search over its corners
and one division, in O(log pieces), however many periods the transfer takes.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedjax_llm.clouds.steps import Steps
from fedjax_llm.clouds.traces import read_steps
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Rate:
    """A bandwidth that changes at given times.

    Attributes:
        seconds: when each piece begins: 0 first, rising strictly.
        mbps: its rate in megabits (10^6 bits) per second; 0 is an outage.
        period_s: the whole repeats every so many seconds, as every day; None: the last rate holds.

    Raises:
        UserError: times that do not rise from 0, a rate that is negative or not finite, a period
            that ends before the last piece begins, or no rate for ever.
    """

    seconds: tuple[float, ...]
    mbps: tuple[float, ...]
    period_s: float | None = None

    def __post_init__(self) -> None:
        steps = self._steps  # checks the times
        for time, rate in zip(self.seconds, self.mbps, strict=True):
            if not 0 <= rate < math.inf:
                raise UserError(
                    f"mbps must be zero or more and finite, got {rate:g} at second {time:g}"
                )
        if not any(self.mbps):
            raise UserError("mbps is 0 at all times, so that nothing would ever arrive; raise one")
        if steps.period_s is None and self.mbps[-1] == 0:
            raise UserError(
                f"mbps is 0 from second {self.seconds[-1]:g} on, so that transfers would never "
                "end; give period_s, or end with a rate above 0"
            )

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.seconds, self.mbps, self.period_s)

    @property
    def mean_mbps(self) -> float:
        """In the long run: over a period, or the rate that holds at the end."""
        return self._steps.mean

    def mbps_at(self, time_s: float) -> float:
        """The rate at `time_s`; a piece holds from its own second on."""
        return self.mbps[self._steps.place(time_s)[2]]

    def finish(self, start_s: float, megabits: float) -> float:
        """When a transfer is through.

        Args:
            start_s: when it starts, in seconds, zero or more.
            megabits: its size, zero or more.

        Returns:
            The first moment, `start_s` or later, by which the link has carried as much.
        """
        if megabits == 0:
            return start_s
        corners = self._steps.corners
        periods, offset, piece = self._steps.place(start_s)
        goal = corners[piece] + (offset - self.seconds[piece]) * self.mbps[piece] + megabits
        if self.period_s is not None:
            whole, goal = divmod(goal, corners[-1])
            if goal == 0:  # through with the last bit of a period, not with the first of the next
                whole, goal = whole - 1, corners[-1]
            periods += whole
        # The first corner at or above the goal ends the piece in which it is reached, and no piece
        # with rate 0 does that, since its corners are equal.
        piece = min(bisect_left(corners, goal), len(self.seconds)) - 1
        time = self.seconds[piece] + (goal - corners[piece]) / self.mbps[piece]
        if self.period_s is not None:
            time += periods * self.period_s
        return max(time, start_s)

    def limited(self, most_mbps: float, share: float = 1.0) -> "Rate":
        """The same times with rates `share` of at most `most_mbps`."""
        rates = tuple(min(rate, most_mbps) * share for rate in self.mbps)
        return Rate(self.seconds, rates, self.period_s)


def rate_from_csv(path: Path, period_s: float | None = None) -> Rate:
    """Reads a rate from a trace file with the header `seconds,mbps`.

    Raises:
        UserError: see `Rate` and `traces.read_steps`; file and line are named.
    """
    seconds, mbps = read_steps(path, "mbps", _mbps)
    try:
        return Rate(seconds, mbps, period_s)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _mbps(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("zero or more megabits per second and finite")
    return value
