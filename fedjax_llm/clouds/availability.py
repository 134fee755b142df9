"""When a cloud can be reached: always, by a trace, or with random failures and repairs.

All three answer the same questions about any moment, in any order: the next moment at which the
cloud is down, the next at which it is up, and how long it was up in between. An interval holds its
beginning and not its end: a cloud that fails at 10 is down at 10.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fedjax_llm.clouds.draws import Uniforms
from fedjax_llm.clouds.steps import Steps
from fedjax_llm.clouds.traces import read_steps
from fedjax_llm.errors import UserError


class Availability(Protocol):
    """What a simulation asks. Times are seconds of virtual time, zero or more."""

    def next_failure(self, seconds: float) -> float:
        """The first moment, `seconds` or later, at which the cloud is down; infinity if none."""

    def next_up(self, seconds: float) -> float:
        """The first moment, `seconds` or later, at which the cloud is up; infinity if none."""

    def up_seconds(self, start_s: float, end_s: float) -> float:
        """How many of the seconds from `start_s` to `end_s` the cloud is up."""

    @property
    def fraction(self) -> float:
        """The part of the time for which it is up in the long run."""


@dataclass(frozen=True)
class Always:
    """A cloud that never fails."""

    fraction = 1.0

    def next_failure(self, seconds: float) -> float:
        """Infinity."""
        return math.inf

    def next_up(self, seconds: float) -> float:
        """At once."""
        return seconds

    def up_seconds(self, start_s: float, end_s: float) -> float:
        """All of them."""
        return max(end_s - start_s, 0.0)


@dataclass(frozen=True)
class Trace:
    """States at given times, as recorded.

    Attributes:
        seconds: when each state begins: 0 first, rising strictly.
        up: the states.
        period_s: the whole repeats every so many seconds; None: the last state holds.

    Raises:
        UserError: times that do not rise from 0, a period that ends before the last state begins,
            or a cloud that is never up.
    """

    seconds: tuple[float, ...]
    up: tuple[bool, ...]
    period_s: float | None = None

    def __post_init__(self) -> None:
        steps = self._steps  # checks the times
        if not any(steps.values):
            raise UserError("the trace is down at all times; leave the cloud out of the run")

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.seconds, tuple(map(float, self.up)), self.period_s)

    @property
    def fraction(self) -> float:
        """Of the period that is up; without one, the state that holds at the end."""
        return self._steps.mean

    def next_failure(self, seconds: float) -> float:
        """See `Availability`."""
        return self._next(False, seconds)

    def next_up(self, seconds: float) -> float:
        """See `Availability`."""
        return self._next(True, seconds)

    def up_seconds(self, start_s: float, end_s: float) -> float:
        """See `Availability`."""
        return max(self._steps.integral(end_s) - self._steps.integral(start_s), 0.0)

    @cached_property
    def _changes(self) -> Steps:
        """The same function without steps that change nothing: its values alternate."""
        values = self._steps.values
        kept = [k for k, value in enumerate(values) if k == 0 or value != values[k - 1]]
        return Steps(
            tuple(self.seconds[k] for k in kept), tuple(values[k] for k in kept), self.period_s
        )

    def _next(self, wanted: bool, seconds: float) -> float:
        changes = self._changes
        periods, _, place = changes.place(seconds)
        if changes.values[place] == wanted:
            return seconds
        place += 1
        if place == len(changes.values):
            if changes.period_s is None or place == 1:
                return math.inf
            periods += 1
            place = 0 if changes.values[0] == wanted else 1
        if changes.period_s is None:
            return changes.seconds[place]
        moment = periods * changes.period_s + changes.seconds[place]
        # Rounded, the sum may lie just before the change, where the state is still the other one;
        # whoever waits for the change would wait for ever.
        while changes.place(moment)[:2] < (periods, changes.seconds[place]):
            moment = math.nextafter(moment, math.inf)
        return moment


def trace_from_csv(path: Path, period_s: float | None = None) -> Trace:
    """Reads a trace file with the header `seconds,up`, up being 0 or 1 (or true, false).

    Raises:
        UserError: see `Trace` and `traces.read_steps`; file and line are named.
    """
    seconds, up = read_steps(path, "up", _state)
    try:
        return Trace(seconds, tuple(map(bool, up)), period_s)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _state(cell: str) -> float:
    try:
        return {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}[cell.lower()]
    except KeyError:
        raise ValueError("0 or 1") from None


@dataclass(frozen=True)
class Failures:
    """Random failures: up and down times are independent and exponential (alternating renewal).

    The cloud is up `mtbf_s / (mtbf_s + mttr_s)` of the time, at the first moment as at any later
    one: the state at 0 is drawn with this probability, and what is left of an exponential time is
    exponential again, so that the process is stationary and short runs are not flattered.

    Attributes:
        mtbf_s: mean time from a repair to the next failure, seconds.
        mttr_s: mean time to repair, seconds.
        seed: of the simulation; with `cloud` the address of all draws.
        cloud: its name.

    Raises:
        UserError: a mean that is not positive and finite.
    """

    mtbf_s: float
    mttr_s: float
    seed: int = 0
    cloud: str = ""

    def __post_init__(self) -> None:
        for name in ("mtbf_s", "mttr_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(
                    f"{name} must be positive and finite, got {value:g}; leave availability out "
                    "for a cloud that never fails"
                )

    @property
    def fraction(self) -> float:
        """MTBF / (MTBF + MTTR)."""
        return self.mtbf_s / (self.mtbf_s + self.mttr_s)

    @cached_property
    def _history(self) -> "_History":
        return _History(self)

    def next_failure(self, seconds: float) -> float:
        """See `Availability`."""
        return self._history.next(False, seconds)

    def next_up(self, seconds: float) -> float:
        """See `Availability`."""
        return self._history.next(True, seconds)

    def up_seconds(self, start_s: float, end_s: float) -> float:
        """See `Availability`."""
        return max(self._history.up_until(end_s) - self._history.up_until(start_s), 0.0)


class _History:
    """The changes of state so far, made longer when a later moment is asked for.

    Each change depends on the draw of its own index and on the change before it, so that the list
    is the same whatever is asked, in whatever order.
    """

    def __init__(self, failures: Failures) -> None:
        self._uniform = Uniforms(failures.seed, "availability", failures.cloud)
        # Draw 0 is the state at 0, draw k the length of interval k - 1.
        self._first = self._uniform(0) <= failures.fraction
        self._means = (failures.mtbf_s, failures.mttr_s)
        self._begins = [0.0]
        self._up = [0.0]  # seconds of being up before each beginning
        # The interval of the last answer: a simulation mostly asks on where it asked before.
        self._here = (0.0, 0.0, False)  # its beginning, its end, whether up

    def next(self, wanted: bool, seconds: float) -> float:
        begin, end, up = self._here
        if not begin <= seconds < end:
            place = self._place(seconds)
            up, end = self._state(place), self._begins[place + 1]
            self._here = (self._begins[place], end, up)
        return seconds if up == wanted else end

    def up_until(self, seconds: float) -> float:
        place = self._place(seconds)
        return self._up[place] + self._state(place) * (seconds - self._begins[place])

    def _state(self, place: int) -> bool:
        return self._first == (place % 2 == 0)

    def _place(self, seconds: float) -> int:
        """The interval that holds `seconds`; its end is known after this."""
        begins = self._begins
        while begins[-1] <= seconds:
            place = len(begins) - 1
            up = self._state(place)
            length = -self._means[0 if up else 1] * math.log(self._uniform(place + 1))
            # An interval of no length would leave a moment in two states.
            end = max(begins[-1] + length, math.nextafter(begins[-1], math.inf))
            self._up.append(self._up[-1] + up * (end - begins[-1]))
            begins.append(end)
        return bisect_right(begins, seconds) - 1
