"""The driver's end: environments, files of the tasks, and processes that train a round a turn."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[3] / "shared"))
# Environments, models and rows are kept there from run to run.
CACHE = Path(os.environ.get("FEDJAX_LLM_PEERS", Path(tempfile.gettempdir()) / "fedjax_llm_peers"))


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made where it is missing; "ours" is ours.

    FEDJAX_LLM_PEERS_PYTHON_PLAIN_CUDA and its like name an interpreter that has a peer's packages
    already.

    Raises:
        CalledProcessError: it cannot be made.
    """
    if peer == "ours":
        return Path(sys.executable)
    there = os.environ.get(f"FEDJAX_LLM_PEERS_PYTHON_{peer.upper().replace('-', '_')}")
    if there:
        return Path(there)
    folder = CACHE / "environments" / peer
    if not (folder / "complete").exists():
        print(f"makes the environment of {peer}, once ...", file=sys.stderr, flush=True)
    subprocess.run([HERE / "make_env.sh", peer, folder], check=True)
    return folder / "bin" / "python"


def folder_of(task: str, script: str = "prepare.py") -> Path:
    """The folder of a task's files, which are written where they are missing."""
    folder = CACHE / "tasks" / task
    subprocess.run(
        [sys.executable, HERE / script, "--task", task, "--folder", folder],
        check=True,
        stdout=sys.stderr,
    )
    return folder


def _usual_environment() -> dict[str, str]:
    """This one's, but that modules are kept compiled: nobody runs a program without."""
    return {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


class Side:
    """A process that trains the rounds of one side, see `turns`.

    Args:
        peer: whose environment.
        script: in this folder.
        task: what to train.
        folder: of the task's files.
        rounds: how many it will train; it ends after the last.
        wait: whether it waits for `turn`; without, it trains them all at once.
        options: more arguments of the script.
        environment: more variables of the environment.
        prefix: words before the command, such as a choice of cores.
    """

    def __init__(
        self,
        peer: str,
        script: str,
        task: str,
        folder: Path,
        *,
        rounds: int,
        wait: bool = True,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = f"{peer} {' '.join(options)}".strip()
        self._trained = tempfile.NamedTemporaryFile(suffix=".npz")  # noqa: SIM115
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command: list[Any] = [*prefix, python_of(peer), HERE / script, "--task", task]
        command += ["--folder", folder, "--rounds", rounds, "--out", self._trained.name, *options]
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(word) for word in command + ["--wait"] * wait],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_usual_environment() | dict(environment or {}),
            # With whatever it starts: workers must not outlive it.
            start_new_session=True,
        )
        self.head = self._read()
        self.rounds: list[dict[str, Any]] = []
        self.tail: dict[str, Any] = {}
        self.seconds_whole = float("nan")

    def turn(self, rounds: int = 1) -> dict[str, Any]:
        """Trains a round, or several without a pause, and returns what the last came to."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n" * rounds)
        self._process.stdin.flush()
        self.rounds += [self._read() for _ in range(rounds)]
        return self.rounds[-1]

    def finish(self) -> "Side":
        """Reads what is left, waits for the end and adds the seconds of the whole command."""
        while not self.tail:
            found = self._read()
            if found.get("end"):
                self.tail = found
            else:
                self.rounds.append(found)
        code = self._process.wait()
        self.seconds_whole = time.perf_counter() - self._started
        if code:
            raise RuntimeError(f"{self.name} ended with {code}: {self._last_words()}")
        return self

    def close(self) -> None:
        """Ends the process, if it still runs, and drops its files."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._errors.close()
        self._trained.close()

    def trained(self) -> dict[str, Any]:
        """What it wrote after the last round."""
        from tasks import read_factors

        return read_factors(Path(self._trained.name))

    def steady(self, warm: int) -> list[float]:
        """Seconds of the rounds after the first ones."""
        return [done["seconds"] for done in self.rounds[warm:]]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._errors.seek(0)
        return "\n".join(self._errors.read().splitlines()[-30:])

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def in_turns(sides: Sequence[Side], turns: Sequence[int]) -> None:
    """Trains each side for so many rounds a turn, one after the other, then waits for their end."""
    for turn, rounds in enumerate(turns):
        # Every other turn backwards, so that nobody always follows the same neighbour.
        for side in sides[:: 1 if turn % 2 == 0 else -1]:
            # Threads of the last one spin for a while when they have nothing to do.
            time.sleep(0.1)
            side.turn(rounds)
    for side in sides:
        side.finish()


def spread(figures: Sequence[float]) -> float:
    """Half of the distance between the quartiles, over the median; 0 for a single figure."""
    if len(figures) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
    return (high - low) / 2 / middle


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of each turn."""
    return statistics.median(x / y for x, y in zip(over, under, strict=True))
