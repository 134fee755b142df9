"""The cells of a sweep: every combination of its axes."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedjax_llm.runs.sweep.file import Axis, SweepFile, Value


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
      values: by the names of the axes.
      overrides: of the run file, `key=VALUE` with the value in TOML.
      devices: fake CPU devices of each process; None leaves that to the environment.
      processes: how many run it together.
    """

    values: dict[str, Value]
    overrides: tuple[str, ...]
    devices: int | None = None
    processes: int = 1

    def describe(self) -> str:
        """The values by name, in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    def identity(self, run_toml: str, versions: Mapping[str, str]) -> str:
        """Names what the cell measures: 16 hexadecimal digits.

        Args:
          run_toml: the resolved run file. What is in it counts, not how the sweep came to it, so
            that a sweep with more cells or other columns keeps what has been measured.
          versions: of packages; another version is another measurement.
        """
        content = json.dumps([run_toml, self.devices, self.processes, dict(versions)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def cells(sweep: SweepFile, overrides: Sequence[str] = ()) -> list[Cell]:
    """All cells; the last axis changes fastest.

    Args:
      sweep: the file.
      overrides: of every cell's run file, after those of the file and before those of the axes.
    """
    found = []
    for places in itertools.product(*(range(len(axis.values)) for axis in sweep.axis)):
        chosen = list(zip(sweep.axis, places, strict=True))
        values = {axis.name: axis.values[place] for axis, place in chosen}
        changes = [
            f"{key}={_toml(value)}" for axis, place in chosen for key, value in axis.changes(place)
        ]
        found.append(
            Cell(
                values,
                (*sweep.set, *overrides, *changes),
                _machine(chosen, "devices"),
                _machine(chosen, "processes") or 1,
            )
        )
    return found


def _machine(chosen: Sequence[tuple[Axis, int]], name: str) -> int | None:
    for axis, place in chosen:
        if axis.name == name:
            return int(axis.values[place])
    return None


def _toml(value: Value) -> str:
    # JSON writes these as TOML does.
    return json.dumps(value)
