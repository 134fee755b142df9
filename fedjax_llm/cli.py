"""The command line: parses, calls, prints. All work is done by the packages below.

Exit codes: 0 done; 2 a user's mistake; 3 refused for privacy or security; 4 another process of the
same run is gone; 130 interrupted; 1 a defect of this package, the only case that shows a traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedjax_llm.errors import FedJaxError, Refused, UserError

if TYPE_CHECKING:
    from fedjax_llm.runs.events import Event, OnEvent
    from fedjax_llm.runs.runfile import RunFile
    from fedjax_llm.runs.summary import Summary

INTERRUPTED = 130
LAUNCHED = ("run", "resume")

# The base of all usage errors. Typer carries its own copy of click, so that the class has to be
# found through the one of its children that typer publishes.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="fedjax-llm",
    help="Federated fine-tuning of large language models: private, encrypted, exact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="Models by name.", no_args_is_help=True)
app.add_typer(models, name="models")
data = typer.Typer(help="Data and tokenizers, before a run.", no_args_is_help=True)
app.add_typer(data, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as privacy.clip_norm=0.5."),
]
RunFolderPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run folder; runs/NAME if left out.")
    ] = None,
) -> None:
    """Do what a run file says."""
    from fedjax_llm.runs import distributed, runfile
    from fedjax_llm.runs.folder import RunFolder

    # First of all: checks of the run file compute, and then it would be too late.
    leads = distributed.join().leads
    run_file = runfile.load(file, overrides or [])
    if not leads:
        _follow(run_file)
        return
    with RunFolder.create(out or Path("runs") / run_file.name, runfile.to_toml(run_file)) as folder:
        _watch(folder.path, lambda on_event: _job().run(run_file, folder, on_event=on_event))


@app.command()
def resume(path: RunFolderPath) -> None:
    """Go on with a run that was interrupted."""
    from fedjax_llm.runs import distributed, runfile
    from fedjax_llm.runs.folder import RunFolder

    folder = RunFolder.open(path)  # a wrong folder is told before JAX is loaded
    if not distributed.join().leads:
        _follow(runfile.load(folder.run_toml))
        return
    _watch(path, lambda on_event: _job().resume(path, on_event=on_event))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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
    from fedjax_llm.runs import cluster, distributed, launch_places, launching

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
        raise _Interrupted(f"interrupted {_reached(folder)}; resume with: {again}") from None
    if ended.process == 0 and ended.code in (UserError.exit_code, Refused.exit_code):
        raise typer.Exit(ended.code)  # it has said why
    if ended.code != 0:
        fewer = max(processes - 1, 1)
        raise distributed.PeerLost(
            f"{launching.why(ended, processes)}; the others were ended {_reached(folder)}; resume, "
            f"on fewer if need be, with: fedjax-llm launch --processes {fewer} resume {folder}"
        )


@app.command()
def report(path: RunFolderPath) -> None:
    """Write report.html of a run folder again."""
    from fedjax_llm.runs import report as reports
    from fedjax_llm.runs.folder import RunFolder

    typer.echo(str(reports.write(RunFolder.open(path))))


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
) -> None:
    """Show runs side by side, and the keys in which they differ."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedjax_llm.runs import compare as comparison

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for path in paths:
        table.add_column(Text(str(path)), overflow="fold")
    for what, values in comparison.table(paths):
        table.add_row(Text(what), *(Text(value) for value in values))
    console = Console()
    # Cut columns are worth nothing in a file or a pipe.
    Console(width=console.width if console.is_terminal else 10_000).print(table)


@app.command()
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
    from fedjax_llm.runs import harmonising, planned, runfile

    run_file = runfile.load(file, overrides or [])
    plan = planned.privacy_plan(run_file, on_event=_print_notes)
    typer.echo(harmonising.privacy_statement(plan.statement(), run_file))
    for line in planned.answers(plan, target, budget):
        typer.echo(line)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file with a [plan].")],
    overrides: Overrides = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="OUT.toml", help="Write the run file of the choice."),
    ] = None,
) -> None:
    """Choose rank, local steps, bits and schedule that reach a target for the least."""
    from rich.console import Console

    from fedjax_llm.runs import disk, planning, runfile
    from fedjax_llm.runs.planning import table

    if write is not None and not write.absolute().parent.is_dir():
        raise UserError(f"there is no folder {write.absolute().parent} to write {write.name} to")
    planned = planning.make(runfile.load(file, overrides or []), on_event=_print_notes)
    console = Console()
    table.show(Console(width=console.width if console.is_terminal else 10_000), planned)
    if write is not None:
        disk.atomic_write(write, runfile.to_toml(planned.run_file))
        typer.echo(str(write))


@app.command()
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
        raise _Interrupted(
            f"interrupted; the cells that are done are kept in {folder}: give the same command "
            "again to go on"
        ) from None
    console = Console()
    Console(width=console.width if console.is_terminal else 10_000).print(table.table(outcomes))
    typer.echo(str(page.write(asked, outcomes, folder)))
    if failed := sum(outcome.figures is None for outcome in outcomes):
        raise UserError(
            f"{failed} of {len(outcomes)} cells failed, the first because: "
            + next(outcome.error for outcome in outcomes if outcome.error)
        )


@app.command()
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
    from fedjax_llm.runs import auditing
    from fedjax_llm.runs.runfile_schema import AuditSection

    asked = AuditSection(
        canaries=canaries, rows=rows, full=full, rounds=rounds, inversion=inversion
    )
    found = auditing.audit_folder(path, asked, on_event=_print_notes)
    if not found.report.consistent:
        raise Refused(
            f"{path} does not keep its promise: {found.report}; do not release it, and report this"
        )


@app.command()
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
            write(folder, out, cloud=cloud, on_event=_print_notes)
            typer.echo(str(out))


@app.command()
def rules() -> None:
    """List the aggregation rules and what each promises, and what goes with them."""
    from rich.console import Console

    from fedjax_llm.runs import rule_list

    console = Console()
    rule_list.show(Console(width=console.width if console.is_terminal else 10_000))


@app.command()
def clouds(
    own: Annotated[
        Path | None,
        typer.Option("--catalogue", metavar="FILE", help="Your own figures, laid over these."),
    ] = None,
) -> None:
    """List the catalogue of clouds: machines, prices and routes, with the source of each figure."""
    from rich.console import Console

    from fedjax_llm.runs import cloud_list

    console = Console()
    cloud_list.show(Console(width=console.width if console.is_terminal else 10_000), own)


@app.command()
def doctor() -> None:
    """Check this machine, and say how to mend what is wrong."""
    from fedjax_llm import doctor as checks

    if not checks.print_report(checks.examine()):
        raise typer.Exit(UserError.exit_code)


@models.command("get")
def models_get(name: Annotated[str, typer.Argument(help="A name of `models list`.")]) -> None:
    """Fetch a model into the cache and print its folder."""
    from fedjax_llm.models import hub

    typer.echo(str(hub.get(name, on_progress=lambda line: typer.echo(line, err=True))))


@models.command("list")
def models_list() -> None:
    """List the models that can be fetched by name."""
    from fedjax_llm.models import hub

    for name, model in hub.REGISTRY.items():
        typer.echo(f"{name}\t{model.repository}\t{hub.cached(name) or 'not in the cache'}")


@data.command("inspect")
def data_inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of rows.")],
) -> None:
    """Tell what files hold, and suggest a mapping for a run file."""
    from fedjax_llm.data import read_rows
    from fedjax_llm.data.harmonise import inspect_rows

    for file in files:
        for line in inspect_rows(str(file), read_rows(file)).lines():
            typer.echo(line)


@data.command("partition")
def data_partition(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.svg", help="Draw it as well.")
    ] = None,
) -> None:
    """Tell who holds what in a run: sizes, labels, and how far each client is from the whole."""
    from rich.console import Console

    from fedjax_llm.runs import partition_report, runfile

    if plot is not None:
        partition_report.check_plot(plot)
    found = partition_report.corpora(runfile.load(file, overrides or []), on_event=_print_notes)
    statistics = partition_report.statistics(found)
    console = Console()
    width = console.width if console.is_terminal else 10_000
    partition_report.show(Console(width=width), found, statistics)
    if plot is not None:
        partition_report.plot(statistics, plot)
        typer.echo(str(plot))


@data.command("tokenizer")
def data_tokenizer(
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


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every error on purpose is one line, and the exit code says of which kind."""
    command = typer.main.get_command(app)
    try:
        with _terminated_as_interrupted():
            code = command.main(arguments, prog_name="fedjax-llm", standalone_mode=False)
    except FedJaxError as error:
        code = _fail(str(error), error.exit_code)
    except _CommandLineError as error:
        code = _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; nobody is there to be told.
        sys.stdout = None
        code = 1
    except Exception:
        if not _in_company():
            raise
        traceback.print_exc()
        code = 1
    if _in_company():
        from fedjax_llm.runs import distributed

        distributed.leave(code or 0)
    sys.exit(code or 0)


def _in_company() -> bool:
    """Whether this process runs together with others."""
    if "jax" not in sys.modules:
        return False
    from fedjax_llm.runs import distributed

    return distributed.joined()


def _usage(error: Any) -> int:
    """Prints what is wrong with the arguments, or the help when there were none."""
    message = error.format_message()
    if message.startswith("Usage:"):
        typer.echo(message, err=True)
        return UserError.exit_code
    command = error.ctx.command_path if error.ctx is not None else "fedjax-llm"
    return _fail(f"{message} (see `{command} --help`)", UserError.exit_code)


class _Interrupted(FedJaxError):
    exit_code = INTERRUPTED


def _fail(message: str, code: int) -> int:
    typer.echo("fedjax-llm: " + " ".join(message.split()), err=True)
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a run in the same orderly way as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _job() -> ModuleType:
    # Imported late: it brings JAX, for which `--help` need not wait.
    from fedjax_llm.runs import job

    return job


def _print_notes(event: "Event") -> None:
    from fedjax_llm.runs.events import Note

    if isinstance(event, Note):
        typer.echo(event.text, err=True)


def _watch(path: Path, work: "Callable[[OnEvent], Summary]") -> None:
    from fedjax_llm.runs import distributed, progress

    with progress.watcher() as on_event:
        try:
            summary = work(on_event)
        except KeyboardInterrupt:
            raise _Interrupted(
                f"interrupted {_reached(path)}; resume with: fedjax-llm resume {path}"
            ) from None
        except (RuntimeError, ValueError) as error:
            if not distributed.lost_peer(error):
                raise
            raise distributed.PeerLost(
                f"another process of this run is gone, {_reached(path)}; its own words tell why; "
                f"resume, on fewer if need be, with: fedjax-llm resume {path}"
            ) from None
    progress.print_summary(summary, path)


def _follow(run_file: "RunFile") -> None:
    """The part of a process that does not lead: it computes and says nothing."""
    from fedjax_llm.runs import distributed
    from fedjax_llm.runs.following import follow

    try:
        follow(run_file)
    except (RuntimeError, ValueError) as error:
        if not distributed.lost_peer(error):
            raise
        raise distributed.PeerLost("another process of this run is gone") from None


def _reached(path: Path) -> str:
    """How far the run in a folder has come, for a sentence that ends there."""
    from fedjax_llm.runs.checkpoints import Checkpoints

    rounds = Checkpoints(path / "checkpoints").rounds()
    return f"after round {rounds[-1]}" if rounds else "before the first checkpoint"


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
