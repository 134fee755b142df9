"""Ledger: what every step took away, changed or added, so that no row disappears uncounted."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """What one step did to the rows of one cloud.

    Attributes:
      name: The step, in words for the user.
      rows_in: Rows that came in.
      dropped: For each reason, how many rows were taken away; reasons without rows are left out.
      changed: Rows that stayed with another text, label or place.
      added: Copies that were made.
      note: What else the user should know about the step; empty if nothing.
    """

    name: str
    rows_in: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    changed: int = 0
    added: int = 0
    note: str = ""

    @property
    def rows_out(self) -> int:
        """Rows that went on to the next step."""
        return self.rows_in - sum(self.dropped.values()) + self.added


@dataclass(frozen=True)
class Ledger:
    """All steps of one cloud, in their order; each begins with what the one before it left.

    Attributes:
      steps: At least none; an empty ledger has no rows.

    Raises:
      ValueError: A step does not begin with the rows that the step before it left, or takes away
        more than it got. That is a defect of this package and not of the data.

    Example:
      >>> Ledger((Step("length", 5, {"shorter than 3 characters": 2}),)).lines()
      ['length: 2 rows dropped (shorter than 3 characters)']
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        """Checks the books."""
        for step in self.steps:
            counts = (*step.dropped.values(), step.changed, step.added)
            if step.rows_out < step.added or min(counts) < 0:
                raise ValueError(f"step {step.name!r} does not add up: {step}")
        for before, after in itertools.pairwise(self.steps):
            if before.rows_out != after.rows_in:
                raise ValueError(
                    f"{before.rows_out} rows left step {before.name!r} and {after.rows_in} entered "
                    f"{after.name!r}"
                )

    def __add__(self, more: Sequence[Step]) -> "Ledger":
        """The ledger with further steps."""
        return Ledger((*self.steps, *more))

    @property
    def rows_in(self) -> int:
        """Rows before the first step."""
        return self.steps[0].rows_in if self.steps else 0

    @property
    def rows_out(self) -> int:
        """Rows after the last step: `rows_in` + copies added - rows dropped."""
        return self.steps[-1].rows_out if self.steps else 0

    def lines(self) -> list[str]:
        """One line for each thing that was done; steps that did nothing are left out."""
        found = []
        for step in self.steps:
            done = [f"{count} rows dropped ({why})" for why, count in step.dropped.items()]
            done += [f"{step.changed} rows changed"] if step.changed else []
            done += [f"{step.added} copies added"] if step.added else []
            done += [step.note] if step.note else []
            if done:
                found.append(f"{step.name}: {', '.join(done)}")
        return found

    def to_json(self) -> list[dict[str, Any]]:
        """The steps as JSON has them, with `rows_out` written out."""
        return [asdict(step) | {"rows_out": step.rows_out} for step in self.steps]


def counted(reasons: Mapping[str, int]) -> dict[str, int]:
    """The reasons that took any row away.

    >>> counted({"too long": 0, "too short": 2})
    {'too short': 2}
    """
    return {reason: count for reason, count in reasons.items() if count}
