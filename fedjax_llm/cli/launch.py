"""The command that starts a run in several processes."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedjax_llm.cli.interrupted import Interrupted
from fedjax_llm.cli.jobs import reached
from fedjax_llm.errors import Refused, UserError

LAUNCHED = ("run", "resume")


def launch(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="run FILE ...", help="A `run` or `resume`, as ever.")
    ],
    processes: Annotated[int, typer.Option("--processes", help="How many, on this machine.")],
    bind: Annotated[
        bool, typer.Option("--bind/--no-bind", help="Each keeps to cores of its own.")
    ] = True,
) -> None:
    """Do a run in several processes on this machine, each with its cores or GPUs."""
    from fedjax_llm.runs.processes import cluster, distributed, launch_places, launching

    folder = _launched_folder(context, command)
    gpus = cluster.gpus()
    places = launch_places.places(
        processes, sorted(os.sched_getaffinity(0)), gpus, bind=bind and not gpus
    )
    try:
        ended = launching.launch(
            launching.program(command),
            places,
            echo=lambda words: typer.echo(words, nl=False, err=True),
        )
    except KeyboardInterrupt:
        again = f"fedjax-llm launch --processes {processes} resume {folder}"
        raise Interrupted(f"interrupted {reached(folder)}; resume with: {again}") from None
    if ended.process == 0 and ended.code in (UserError.exit_code, Refused.exit_code):
        raise typer.Exit(ended.code)  # it has said why
    if ended.code != 0:
        fewer = max(processes - 1, 1)
        raise distributed.PeerLost(
            f"{launching.why(ended, processes)}; the others were ended {reached(folder)}; resume, "
            f"on fewer if need be, with: fedjax-llm launch --processes {fewer} resume {folder}"
        )


def _launched_folder(context: typer.Context, command: list[str]) -> Path:
    """The run folder of a command to launch, which is read as the processes will read it.

    What is wrong with it is told once, before there are any.
    """
    name, *arguments = command
    if name not in LAUNCHED:
        raise UserError(f"launch starts {' or '.join(LAUNCHED)}, got {name!r}; run it by itself")
    parent = context.parent
    assert parent is not None
    commands: dict[str, Any] = getattr(parent.command, "commands")  # noqa: B009
    found = commands[name].make_context(name, arguments, parent).params
    if name == "resume":
        from fedjax_llm.runs.folder import RunFolder

        return RunFolder.open(found["path"]).path
    from fedjax_llm.runs import runfile

    run_file = runfile.load(found["file"], found["overrides"] or [])
    return found["out"] or Path("runs") / run_file.name
