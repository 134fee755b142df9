"""One cell's process: started, watched, and measured from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
      code: its exit code, or minus the number of the signal that ended it.
      seconds: from its start to its end.
      peak_bytes: most memory that it, or one of those that it waited for, held at once. Linux
        counts in what the starting process held, so that a cell never reads below that.
      late: whether it was ended because its time was up.
    """

    code: int
    seconds: float
    peak_bytes: int
    late: bool = False


def command(run_file: Path, overrides: Sequence[str], out: Path, processes: int) -> list[str]:
    """The command line of a cell, in this interpreter."""
    run = ["run", str(run_file), "--out", str(out)]
    for override in overrides:
        run += ["--set", override]
    launch = ["launch", "--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-P", "-m", "fedjax_llm", *launch, *run]


def environment(devices: int | None) -> Mapping[str, str]:
    """This process's environment, with so many fake CPU devices if that is asked for."""
    if devices is None:
        return os.environ
    # JAX reads the number here, or in XLA_FLAGS, and refuses to be told both.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(kept),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def run(arguments: Sequence[str], env: Mapping[str, str], log: Path, seconds: float) -> Ended:
    """Runs a command to its end, what it writes in a log.

    Args:
      arguments: program and arguments.
      env: the environment.
      log: replaced.
      seconds: after so many it is asked to end, and soon after made to.

    Raises:
      KeyboardInterrupt: asked to end; the process is gone.
    """
    started = time.monotonic()
    with log.open("wb") as file:
        # A session of its own: a key pressed in the terminal reaches this process, which then ends
        # the other with all that it has started.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )
    limits = [(seconds, signal.SIGTERM), (seconds + _GRACE_SECONDS, signal.SIGKILL)]
    late = False
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            passed = time.monotonic() - started
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return Ended(process.returncode, passed, usage.ru_maxrss * 1024, late)
            if limits and passed > limits[0][0]:
                _signal(process.pid, limits.pop(0)[1])
                late = True
            time.sleep(_LOOK_SECONDS)
    except BaseException:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def last_line(log: Path) -> str:
    """The last line of a log that says something; it tells why a command failed."""
    lines = log.read_text("utf-8", "replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("fedjax-llm: ") if said else "it said nothing"
