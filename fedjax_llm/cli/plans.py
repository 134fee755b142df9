"""The commands that look ahead from a run file: `epsilon`, `plan` and `sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_llm.cli.interrupted import Interrupted
from fedjax_llm.cli.options import Overrides
from fedjax_llm.cli.showing import print_notes, wide_console
from fedjax_llm.errors import UserError


def epsilon(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    target: Annotated[
        float | None, typer.Option("--target", metavar="EPSILON", help="Tell the noise for it.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="EPSILON", help="Tell the rounds for it.")
    ] = None,
) -> None:
    """Tell the epsilon of a run file's plan, and of other noise, rates and rounds."""
    from fedjax_llm.runs import runfile
    from fedjax_llm.runs.build import harmonising
    from fedjax_llm.runs.preview import planned

    run_file = runfile.load(file, overrides or [])
    plan = planned.privacy_plan(run_file, on_event=print_notes)
    typer.echo(harmonising.privacy_statement(plan.statement(), run_file))
    for line in planned.answers(plan, target, budget):
        typer.echo(line)


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file with a [plan].")],
    overrides: Overrides = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="OUT.toml", help="Write the run file of the choice."),
    ] = None,
) -> None:
    """Choose rank, local steps, bits and schedule that reach a target for the least."""
    from fedjax_llm.runs import planning, runfile
    from fedjax_llm.runs.folder import disk
    from fedjax_llm.runs.planning import table

    if write is not None and not write.absolute().parent.is_dir():
        raise UserError(f"there is no folder {write.absolute().parent} to write {write.name} to")
    planned = planning.make(runfile.load(file, overrides or []), on_event=print_notes)
    table.show(wide_console(), planned)
    if write is not None:
        disk.atomic_write(write, runfile.to_toml(planned.run_file))
        typer.echo(str(write))


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The sweep's folder; sweeps/NAME if left out.")
    ] = None,
) -> None:
    """Run a grid of changes to a run file, and show how it scales; goes on where it stopped."""
    from rich.console import Console

    from fedjax_llm.runs import sweep as sweeps
    from fedjax_llm.runs.sweep import page, table, watching

    asked = sweeps.load(file)
    folder = out or Path("sweeps") / asked.name
    try:
        outcomes = watching.watch(asked, folder, overrides or [], Console(stderr=True))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the cells that are done are kept in {folder}: give the same command "
            "again to go on"
        ) from None
    wide_console().print(table.table(outcomes))
    typer.echo(str(page.write(asked, outcomes, folder)))
    if failed := sum(outcome.figures is None for outcome in outcomes):
        raise UserError(
            f"{failed} of {len(outcomes)} cells failed, the first because: "
            + next(outcome.error for outcome in outcomes if outcome.error)
        )
