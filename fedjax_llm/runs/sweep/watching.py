"""A sweep in a terminal: a bar while it runs, a line for each cell that ends."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedjax_llm.runs.sweep.file import SweepFile
from fedjax_llm.runs.sweep.grid import Cell, cells
from fedjax_llm.runs.sweep.running import Outcome, run
from fedjax_llm.runs.text import seconds_text


def watch(sweep: SweepFile, out: Path, overrides: Sequence[str], console: Console) -> list[Outcome]:
    """Runs a sweep and shows how far it is; arguments and errors are those of `running.run`."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cells(sweep, overrides)))

        def on_cell(place: int, cell: Cell, outcome: Outcome | None) -> None:
            if outcome is None:
                progress.update(task, description=cell.describe())
                return
            progress.update(task, completed=place + 1)
            console.print(line(outcome), markup=False, highlight=False, soft_wrap=True)

        return run(sweep, out, overrides, on_cell)


def line(outcome: Outcome) -> str:
    """What became of a cell."""
    words = outcome.error
    if (found := outcome.figures) is not None:
        words = (
            f"{seconds_text(found.seconds_round)} a round, "
            f"{found.tokens_per_second:,.0f} tokens/s" + (", from before" if outcome.before else "")
        )
    return f"{outcome.cell.describe()}: {words}"
