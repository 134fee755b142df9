"""The commands that tell what there is: `rules`, `clouds`, `doctor` and `models`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_llm.cli.showing import wide_console
from fedjax_llm.errors import UserError


def rules() -> None:
    """List the aggregation rules and what each promises, and what goes with them."""
    from fedjax_llm.runs.preview import rule_list

    rule_list.show(wide_console())


def clouds(
    own: Annotated[
        Path | None,
        typer.Option("--catalogue", metavar="FILE", help="Your own figures, laid over these."),
    ] = None,
) -> None:
    """List the catalogue of clouds: machines, prices and routes, with the source of each figure."""
    from fedjax_llm.runs.preview import cloud_list

    cloud_list.show(wide_console(), own)


def doctor() -> None:
    """Check this machine, and say how to mend what is wrong."""
    from fedjax_llm import doctor as checks

    if not checks.print_report(checks.examine()):
        raise typer.Exit(UserError.exit_code)


def models_get(name: Annotated[str, typer.Argument(help="A name of `models list`.")]) -> None:
    """Fetch a model into the cache and print its folder."""
    from fedjax_llm.models import hub

    typer.echo(str(hub.get(name, on_progress=lambda line: typer.echo(line, err=True))))


def models_list() -> None:
    """List the models that can be fetched by name."""
    from fedjax_llm.models import hub

    for name, model in hub.REGISTRY.items():
        typer.echo(f"{name}\t{model.repository}\t{hub.cached(name) or 'not in the cache'}")
