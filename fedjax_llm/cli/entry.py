"""The entry point: every error on purpose is one line, and the exit code says of which kind."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from fedjax_llm.cli.commands import app
from fedjax_llm.cli.interrupted import INTERRUPTED
from fedjax_llm.errors import FedJaxError, UserError

# The base of all usage errors. Typer carries its own copy of click, so that the class has to be
# found through the one of its children that typer publishes.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
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
        from fedjax_llm.runs.processes import distributed

        distributed.leave(code or 0)
    sys.exit(code or 0)


def _in_company() -> bool:
    """Whether this process runs together with others."""
    if "jax" not in sys.modules:
        return False
    from fedjax_llm.runs.processes import distributed

    return distributed.joined()


def _usage(error: Any) -> int:
    """Prints what is wrong with the arguments, or the help when there were none."""
    message = error.format_message()
    if message.startswith("Usage:"):
        typer.echo(message, err=True)
        return UserError.exit_code
    command = error.ctx.command_path if error.ctx is not None else "fedjax-llm"
    return _fail(f"{message} (see `{command} --help`)", UserError.exit_code)


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
