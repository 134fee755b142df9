"""The commands that run rounds in this process: `run` and `resume`."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from fedjax_llm.cli.interrupted import Interrupted
from fedjax_llm.cli.options import Overrides, RunFolderPath

if TYPE_CHECKING:
    from fedjax_llm.runs.events import OnEvent
    from fedjax_llm.runs.folder.summary import Summary
    from fedjax_llm.runs.sections.schema import RunFile


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run folder; runs/NAME if left out.")
    ] = None,
) -> None:
    """Do what a run file says."""
    from fedjax_llm.runs import runfile
    from fedjax_llm.runs.folder import RunFolder
    from fedjax_llm.runs.processes import distributed

    # First of all: checks of the run file compute, and then it would be too late.
    leads = distributed.join().leads
    run_file = runfile.load(file, overrides or [])
    if not leads:
        _follow(run_file)
        return
    with RunFolder.create(out or Path("runs") / run_file.name, runfile.to_toml(run_file)) as folder:
        _watch(folder.path, lambda on_event: _job().run(run_file, folder, on_event=on_event))


def resume(path: RunFolderPath) -> None:
    """Go on with a run that was interrupted."""
    from fedjax_llm.runs import runfile
    from fedjax_llm.runs.folder import RunFolder
    from fedjax_llm.runs.processes import distributed

    folder = RunFolder.open(path)  # a wrong folder is told before JAX is loaded
    if not distributed.join().leads:
        _follow(runfile.load(folder.run_toml))
        return
    _watch(path, lambda on_event: _job().resume(path, on_event=on_event))


def _job() -> ModuleType:
    # Imported late: it brings JAX, for which `--help` need not wait.
    from fedjax_llm.runs import job

    return job


def _watch(path: Path, work: "Callable[[OnEvent], Summary]") -> None:
    """Does the work of a run folder, shown as it goes; says how to go on if it ends too early."""
    from fedjax_llm.runs.processes import distributed
    from fedjax_llm.runs.report import progress

    with progress.watcher() as on_event:
        try:
            summary = work(on_event)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted {reached(path)}; resume with: fedjax-llm resume {path}"
            ) from None
        except (RuntimeError, ValueError) as error:
            if not distributed.lost_peer(error):
                raise
            raise distributed.PeerLost(
                f"another process of this run is gone, {reached(path)}; its own words tell why; "
                f"resume, on fewer if need be, with: fedjax-llm resume {path}"
            ) from None
    progress.print_summary(summary, path)


def _follow(run_file: "RunFile") -> None:
    """The part of a process that does not lead: it computes and says nothing."""
    from fedjax_llm.runs.job.following import follow
    from fedjax_llm.runs.processes import distributed

    try:
        follow(run_file)
    except (RuntimeError, ValueError) as error:
        if not distributed.lost_peer(error):
            raise
        raise distributed.PeerLost("another process of this run is gone") from None


def reached(path: Path) -> str:
    """How far the run in a folder has come, for a sentence that ends there."""
    from fedjax_llm.runs.folder.checkpoints import Checkpoints

    rounds = Checkpoints(path / "checkpoints").rounds()
    return f"after round {rounds[-1]}" if rounds else "before the first checkpoint"
