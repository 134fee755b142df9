"""Sites for the tests of schedules: links of a constant rate, and failures at given times."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds.site import Presence, Site, Size


@dataclass(frozen=True)
class DownTimes:
    """Down in each half-open interval [first, last)."""

    intervals: tuple[tuple[float, float], ...]

    def next_failure(self, seconds: float) -> float:
        place = bisect.bisect_right([last for _, last in self.intervals], seconds)
        if place == len(self.intervals):
            return math.inf
        return max(seconds, self.intervals[place][0])

    def next_up(self, seconds: float) -> float:
        place = bisect.bisect_right([last for _, last in self.intervals], seconds)
        if place == len(self.intervals) or self.intervals[place][0] > seconds:
            return seconds
        return self.intervals[place][1]


def site(
    place: int,
    *,
    down: float = 1.0,
    train: float = 2.0,
    up: float = 4.0,
    steps: int = 1,
    down_times: Sequence[tuple[float, float]] = (),
    presence: Presence | None = None,
) -> Site:
    """A site whose transfers take so many seconds for a message, whatever its size; 0 for none."""
    return Site(
        f"cloud-{place}",
        place,
        lambda start, size, index: start + down * (size > 0),
        lambda start, size, index: start + up * (size > 0),
        train,
        steps,
        [Size(1, 1)],
        None,
        DownTimes(tuple(down_times)) if down_times else presence,
    )
