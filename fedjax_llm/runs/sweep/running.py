"""Running a sweep: cell by cell, what is done is kept, and a bad cell does not stop the others."""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.runs import machine, runfile
from fedjax_llm.runs.folder import disk, metrics, summary
from fedjax_llm.runs.sweep import figures, process
from fedjax_llm.runs.sweep.figures import Figures
from fedjax_llm.runs.sweep.file import SweepFile
from fedjax_llm.runs.sweep.grid import Cell, cells

RESULTS = "results.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
      cell: which.
      figures: what it measured; None where it failed.
      error: why it failed, in one line; "" where it did not.
      machine: what it ran on, as the run's summary has it.
      versions: of packages.
      before: whether it was measured by an earlier call.
    """

    cell: Cell
    figures: Figures | None = None
    error: str = ""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    before: bool = False


OnCell = Callable[[int, Cell, Outcome | None], None]
"""Is told of a cell by `(place, cell, None)` when it begins, with its outcome when it has ended."""


def run(
    sweep: SweepFile,
    out: Path,
    overrides: Sequence[str] = (),
    on_cell: OnCell = lambda place, cell, outcome: None,
) -> list[Outcome]:
    """Measures every cell that has not been measured in this folder.

    A cell is what its resolved run file says, on so many devices and processes, with these versions
    of packages; when that changes, or a cell has failed, it is measured. Whoever edits the code of
    this package takes another folder. A cell that was interrupted begins anew: rounds that two
    processes ran are no measurement.

    Args:
      sweep: the file.
      out: the folder; made if missing. Holds a file for each cell that is done, written at its end
        in one step, a log of each, and results.json.
      overrides: of every cell's run file, `key=VALUE`.
      on_cell: is told of each cell.

    Returns:
      One outcome a cell, in the order of the grid.

    Raises:
      UserError: the folder cannot be made, another sweep is at work in it, or the disk is full.
    """
    with _locked(out) as kept:
        outcomes = []
        for place, cell in enumerate(cells(sweep, overrides)):
            on_cell(place, cell, None)
            outcomes.append(_outcome(sweep, cell, kept))
            on_cell(place, cell, outcomes[-1])
        disk.atomic_write(out / RESULTS, json.dumps(rows(outcomes), indent=2) + "\n")
    return outcomes


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What results.json holds: a cell's values, figures or error, and where it ran."""
    return [
        {
            "cell": outcome.cell.values,
            "figures": outcome.figures and dataclasses.asdict(outcome.figures),
            "error": outcome.error,
            "machine": outcome.machine,
            "versions": outcome.versions,
        }
        for outcome in outcomes
    ]


def _outcome(sweep: SweepFile, cell: Cell, kept: Path) -> Outcome:
    """The cell as an earlier call has left it, or measured now."""
    path = Path(sweep.run)
    try:
        run_toml = runfile.to_toml(runfile.load(path, cell.overrides))
    except FedJaxError as error:
        return Outcome(cell, error=str(error))
    name = cell.identity(run_toml, machine.versions())
    done, folder, log = kept / f"{name}.json", kept / f"{name}.run", kept / f"{name}.log"
    if (found := _read(done, cell)) is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    ended = process.run(
        process.command(path, cell.overrides, folder, cell.processes),
        process.environment(cell.devices),
        log,
        sweep.minutes * 60,
    )
    try:
        outcome = _measured(cell, folder, ended, log, sweep.minutes)
    except UserError as error:
        return Outcome(cell, error=str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if outcome.figures is not None:
        disk.atomic_write(done, json.dumps(rows([outcome])[0]) + "\n")
    return outcome


def _measured(cell: Cell, folder: Path, ended: process.Ended, log: Path, minutes: float) -> Outcome:
    place = f"{log.parent.name}/{log.name}"  # results may travel, and name no folder of a machine
    if ended.late:
        return Outcome(cell, error=f"took more than {minutes:g} minutes; raise minutes")
    if ended.code != 0:
        how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        return Outcome(cell, error=f"{process.last_line(log)} ({how}; {place})")
    result = summary.read(folder / "summary.json")
    if result is None:
        return Outcome(cell, error=f"its run wrote no summary; see {place}")
    records = metrics.read(folder / "metrics.jsonl")
    found = figures.of(records, ended.seconds, ended.peak_bytes)
    return Outcome(cell, found, "", result.machine, result.versions)


def _read(done: Path, cell: Cell) -> Outcome | None:
    try:
        values = json.loads(done.read_text())
        found = figures.from_json(values["figures"])
        return Outcome(cell, found, "", values["machine"], values["versions"], before=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another version: it is measured again


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder of cells, for this process alone."""
    kept = out / "cells"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {kept}: {error.strerror}; choose another with --out"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another sweep is at work in {out}; wait for it, or choose another folder with --out"
        ) from None
    try:
        yield kept
    finally:
        os.close(descriptor)
