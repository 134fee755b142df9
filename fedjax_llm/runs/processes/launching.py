"""Several processes of one command on this machine: started, watched, ended together.

The first process has the terminal; what the others write on standard error comes with their number
in front. When one ends in error the others cannot go on, so that they are ended at once.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedjax_llm.runs.processes.distributed import LIFELINE, PeerLost
from fedjax_llm.runs.processes.launch_places import Place, environment

GRACE_SECONDS = 5.0
# Those that a death takes along end within milliseconds of it, in any order.
_TOGETHER_SECONDS = 0.5
_HOLD_SECONDS = 0.25
_LAST_LINES = 20
_VICTIMS = {PeerLost.exit_code, -signal.SIGABRT}


@dataclass(frozen=True)
class Ended:
    """How the launched processes ended.

    Attributes:
      process: the one that ended first; 0 where all is well.
      code: its exit code, or minus the number of a signal.
      lines: the last that it wrote on standard error.
    """

    process: int
    code: int
    lines: tuple[str, ...] = ()


def program(arguments: Sequence[str]) -> list[str]:
    """The command line of this package with arguments, in this interpreter."""
    return [sys.executable, "-P", "-m", "fedjax_llm", *arguments]


def launch(
    command: Sequence[str],
    places: Sequence[Place],
    *,
    echo: Callable[[str], None],
    grace: float = GRACE_SECONDS,
) -> Ended:
    """Runs a command in as many processes as there are places, to the end of all.

    Args:
      command: program and arguments.
      places: of the processes on this machine.
      echo: is given what goes to standard error, line ends included.
      grace: seconds that processes have to end after they are asked to.

    Returns:
      How the first that failed ended, when the others are gone as well.

    Raises:
      KeyboardInterrupt: asked to end; all processes are gone.
    """
    crew = _Crew(command, places, echo)
    try:
        return crew.wait(grace)
    finally:
        crew.end(grace)


def why(ended: Ended, processes: int) -> str:
    """What happened to a process, in words that fit into one line.

    >>> why(Ended(1, -9), 2)
    'process 1 of 2 was ended by SIGKILL, as a system does that runs out of memory'
    >>> why(Ended(0, 1, ("Traceback", "ValueError: 3", "")), 2)
    "process 0 of 2 ended with code 1, its last words: 'ValueError: 3'"
    """
    who = f"process {ended.process} of {processes}"
    if ended.code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-ended.code).name
            memory = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
            return f"{who} was ended by {name}{memory}"
    last = next((line for line in reversed(ended.lines) if line.strip()), None)
    words = f", its last words: {last!r}" if last else ""
    return f"{who} ended with code {ended.code}{words}"


class _Crew:
    """The processes, a thread for each that waits for its end and one that reads what it says."""

    def __init__(
        self, command: Sequence[str], places: Sequence[Place], echo: Callable[[str], None]
    ) -> None:
        self._exits: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._echo, self._hushed = echo, threading.Event()
        self._last: list[deque[str]] = [deque(maxlen=_LAST_LINES) for _ in places]
        self._unsaid: list[list[str]] = [[] for _ in places]
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        # Its writing end is held by this process alone, whose end, of whatever kind, ends them.
        reader, lifeline = os.pipe()
        self._lifeline: int | None = lifeline
        try:
            port = _free_port()
            for k, place in enumerate(places):
                known = environment(os.environ, port, places, k) | {LIFELINE: str(reader)}
                with _on_cores(place.cores):
                    process = subprocess.Popen(
                        command,
                        env=known,
                        stdin=subprocess.DEVNULL,
                        stdout=None if k == 0 else subprocess.PIPE,
                        stderr=subprocess.PIPE if k == 0 else subprocess.STDOUT,
                        pass_fds=(reader,),
                        # Ctrl-C is for this process, which ends them in order.
                        process_group=0,
                    )
                self._processes.append(process)
                self._begin(self._read, k)
                self._begin(self._wait, k)
        except BaseException:
            self.end(0.0)
            raise
        finally:
            os.close(reader)

    def wait(self, grace: float) -> Ended:
        """Waits for the first failure, or the good end of all."""
        for _ in self._processes:
            first = self._exits.get()
            if first[1] != 0:
                # What the others say now is about the one that is gone.
                self._hushed.set()
                exits = [first, *self._failures_until(time.monotonic() + _TOGETHER_SECONDS)]
                process, code = min(exits, key=lambda own: (own[1] in _VICTIMS, own[0] != 0))
                self.end(grace)
                for line in self._unsaid[process]:
                    self._echo(line)
                return Ended(process, code, tuple(self._last[process]))
        self._join()
        return Ended(0, 0)

    def end(self, grace: float) -> None:
        """Asks those that live to end, kills those that do not, and waits for all."""
        self._hushed.set()
        deadline = time.monotonic() + grace
        try:
            self._signal(signal.SIGTERM)
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._signal(signal.SIGKILL)
            for process in self._processes:
                process.wait()
        self._join()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _join(self) -> None:
        for thread in self._threads:
            # A grandchild may hold the pipe; what it says is not waited for.
            thread.join(1.0)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _begin(self, work: Callable[[int], None], k: int) -> None:
        thread = threading.Thread(target=work, args=(k,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait(self, k: int) -> None:
        self._exits.put((k, self._processes[k].wait()))

    def _failures_until(self, deadline: float) -> Iterator[tuple[int, int]]:
        while (left := deadline - time.monotonic()) > 0:
            try:
                process, code = self._exits.get(timeout=left)
            except queue.Empty:
                return
            if code:
                yield process, code

    def _read(self, k: int) -> None:
        process = self._processes[k]
        pipe = process.stderr if k == 0 else process.stdout
        assert pipe is not None
        mark, rest = f"[process {k}] " if k else "", b""
        with pipe:
            while chunk := pipe.read1(1 << 16):  # type: ignore[attr-defined]
                *whole, rest = (rest + chunk).split(b"\n")
                self._say(k, mark, whole)
            self._say(k, mark, [rest] if rest else [])

    def _say(self, k: int, mark: str, lines: Sequence[bytes]) -> None:
        words = [line.decode(errors="replace") for line in lines]
        self._last[k].extend(words)
        # One that dies makes all others complain, and the death is heard of a moment later.
        if words and self._hushed.wait(_HOLD_SECONDS):
            self._unsaid[k].extend(f"{mark}{line}\n" for line in words)
        else:
            for line in words:
                self._echo(f"{mark}{line}\n")


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """A process that is started meanwhile is bound to these cores: it inherits them."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
