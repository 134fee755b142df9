"""The commands of `data`: data and tokenizers, before a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_llm.cli.options import Overrides
from fedjax_llm.cli.showing import print_notes, wide_console
from fedjax_llm.errors import UserError


def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of rows.")],
) -> None:
    """Tell what files hold, and suggest a mapping for a run file."""
    from fedjax_llm.data import read_rows
    from fedjax_llm.data.harmonise import inspect_rows

    for file in files:
        for line in inspect_rows(str(file), read_rows(file)).lines():
            typer.echo(line)


def partition(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.svg", help="Draw it as well.")
    ] = None,
) -> None:
    """Tell who holds what in a run: sizes, labels, and how far each client is from the whole."""
    from fedjax_llm.runs import runfile
    from fedjax_llm.runs.preview import partition_report

    if plot is not None:
        partition_report.check_plot(plot)
    found = partition_report.corpora(runfile.load(file, overrides or []), on_event=print_notes)
    statistics = partition_report.statistics(found)
    partition_report.show(wide_console(), found, statistics)
    if plot is not None:
        partition_report.plot(statistics, plot)
        typer.echo(str(plot))


def tokenizer(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Model folders.")],
) -> None:
    """Print the hash of a tokenizer that clouds declare; of several, tell how they differ."""
    from fedjax_llm.data.harmonise import identify
    from fedjax_llm.models.tokenizer import load_tokenizer

    found = [(folder, identify(load_tokenizer(folder))) for folder in folders]
    for folder, identity in found:
        typer.echo(f"{identity.digest}  {folder}")
    for folder, identity in found[1:]:
        if parts := found[0][1].differing(identity):
            raise UserError(
                f"{folder} and {found[0][0]} differ in {', '.join(parts)}; clouds must use one"
            )
