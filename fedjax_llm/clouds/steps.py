"""A step function of time and its integral, under bandwidths over time and under availability."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Steps:
    """A value that changes at given times.

    Attributes:
        seconds: when each value begins to hold: 0 first, rising strictly.
        values: zero or more each.
        period_s: the whole repeats every so many seconds; None: the last value holds for ever.

    Raises:
        UserError: times that do not rise from 0, not a value for each, or a period that ends
            before the last value begins.
    """

    seconds: tuple[float, ...]
    values: tuple[float, ...]
    period_s: float | None

    def __post_init__(self) -> None:
        times, period = self.seconds, self.period_s
        if not times or len(times) != len(self.values):
            raise UserError(
                f"each time needs one value, got {len(times)} times and {len(self.values)} values"
            )
        if times[0] != 0:
            raise UserError(f"times must begin at second 0, got {times[0]:g}; add what holds at 0")
        for before, time in pairwise(times):
            if not before < time < math.inf:
                raise UserError(f"times must rise, got {time:g} after {before:g}; sort them")
        if period is not None and not times[-1] < period < math.inf:
            raise UserError(
                f"period_s must be finite and above the last time {times[-1]:g}, got {period:g}"
            )

    @cached_property
    def corners(self) -> list[float]:
        """The integral from 0 to each of the times and, with a period, to its end."""
        ends = self.seconds[1:] if self.period_s is None else (*self.seconds[1:], self.period_s)
        pieces = zip(self.seconds, ends, self.values, strict=False)
        return list(accumulate(((end - start) * value for start, end, value in pieces), initial=0))

    @property
    def mean(self) -> float:
        """In the long run: over a period, or the value that holds at the end."""
        return self.values[-1] if self.period_s is None else self.corners[-1] / self.period_s

    def place(self, time_s: float) -> tuple[float, float, int]:
        """Whole periods before `time_s`, seconds into its period, and the step that holds then."""
        periods, offset = 0.0, time_s
        if self.period_s is not None:
            periods, offset = divmod(time_s, self.period_s)
        return periods, offset, bisect_right(self.seconds, offset) - 1

    def integral(self, time_s: float) -> float:
        """From 0 to `time_s`."""
        periods, offset, step = self.place(time_s)
        part = self.corners[step] + self.values[step] * (offset - self.seconds[step])
        return part if self.period_s is None else periods * self.corners[-1] + part
