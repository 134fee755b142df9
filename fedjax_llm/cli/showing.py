"""How commands print: notes of what they call, and tables."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedjax_llm.runs.events import Event


def print_notes(event: "Event") -> None:
    """Prints the notes among events, on stderr."""
    from fedjax_llm.runs.events import Note

    if isinstance(event, Note):
        typer.echo(event.text, err=True)


def wide_console() -> "Console":
    """A console for tables: as wide as the terminal, or wide enough where there is none.

    Cut columns are worth nothing in a file or a pipe.
    """
    from rich.console import Console

    console = Console()
    return Console(width=console.width if console.is_terminal else 10_000)
