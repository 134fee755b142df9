"""The commands that work on a run folder: `report`, `compare`, `audit` and `export`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_llm.cli.options import RunFolderPath
from fedjax_llm.cli.showing import print_notes, wide_console
from fedjax_llm.errors import Refused, UserError


def report(path: RunFolderPath) -> None:
    """Write report.html of a run folder again."""
    from fedjax_llm.runs import report as reports
    from fedjax_llm.runs.folder import RunFolder

    typer.echo(str(reports.write(RunFolder.open(path))))


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
) -> None:
    """Show runs side by side, and the keys in which they differ."""
    from rich.table import Table
    from rich.text import Text

    from fedjax_llm.runs.report import compare as comparison

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for path in paths:
        table.add_column(Text(str(path)), overflow="fold")
    for what, values in comparison.table(paths):
        table.add_row(Text(what), *(Text(value) for value in values))
    wide_console().print(table)


def audit(
    path: RunFolderPath,
    canaries: Annotated[int, typer.Option("--canaries", min=8, help="Coins to toss.")] = 500,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Real rows among them.")] = 64,
    full: Annotated[
        bool, typer.Option("--full", help="All take part in every step of the twin.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Of the twin; the run's if left out.")
    ] = None,
    inversion: Annotated[
        bool, typer.Option("--inversion", help="Attack the text of one row as well.")
    ] = False,
) -> None:
    """Bound the epsilon of a run from below, by canaries in a twin of it."""
    from fedjax_llm.runs.job import auditing
    from fedjax_llm.runs.sections.evaluation import AuditSection

    asked = AuditSection(
        canaries=canaries, rows=rows, full=full, rounds=rounds, inversion=inversion
    )
    found = auditing.audit_folder(path, asked, on_event=print_notes)
    if not found.report.consistent:
        raise Refused(
            f"{path} does not keep its promise: {found.report}; do not release it, and report this"
        )


def export(
    path: RunFolderPath,
    peft: Annotated[
        Path | None, typer.Option("--peft", metavar="OUT", help="Adapters in PEFT's format.")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option("--merged", metavar="OUT", help="The model, adapters merged in.")
    ] = None,
    cloud: Annotated[
        str | None,
        typer.Option("--cloud", metavar="NAME", help="Whose, where each cloud has its own."),
    ] = None,
) -> None:
    """Write what a run has learned for use elsewhere."""
    from fedjax_llm.runs import export as exports
    from fedjax_llm.runs.folder import RunFolder

    if peft is None and merged is None:
        raise UserError("say what to export: --peft OUT, --merged OUT, or both")
    folder = RunFolder.open(path)
    for write, out in ((exports.export_peft, peft), (exports.export_merged, merged)):
        if out is not None:
            write(folder, out, cloud=cloud, on_event=print_notes)
            typer.echo(str(out))
