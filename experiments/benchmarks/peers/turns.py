"""How a side is driven: it says what it is, then trains one round for each line it is sent.

Every environment imports it: the standard library alone. All that a side writes is one JSON object
a line on standard output: first its head, then `{"seconds": ..., "processor": ..., "loss": ...}`
for each round, last `{"end": true, ...}`. `processor` is the processor time of this process alone,
which other work on the machine lengthens less; workers of its own are not in it. What libraries
print goes to standard error.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


def arguments(description: str, tasks: list[str]) -> argparse.ArgumentParser:
    """The command line that every side has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=tasks, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--wait", action="store_true", help="for a line before each round")
    parser.add_argument("--threads", type=int, default=2, help="of a library that does not choose")
    parser.add_argument("--out", type=Path, help="write there what has been trained")
    return parser


class Turns:
    """A side's end of the talk.

    Args:
        wait: whether each round waits for a line on standard input.
    """

    def __init__(self, wait: bool) -> None:
        self._wait, self._created = wait, time.perf_counter()
        self._processor = 0.0
        self._out: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        # Whoever else prints, threads and child processes too, must not write between our lines.
        os.dup2(2, 1)

    def ready(self, **head: Any) -> None:
        """Everything is loaded; versions and settings are in the head."""
        self._say({**head, "seconds_ready": time.perf_counter() - self._created})

    def go(self) -> float:
        """Waits for this side's turn; returns when it began, by `time.perf_counter`."""
        if self._wait and not sys.stdin.readline():
            raise SystemExit("the driver has gone")
        self._processor = time.process_time()
        return time.perf_counter()

    def done(self, started: float, loss: float | Callable[[], float], **more: Any) -> None:
        """A round is over.

        Args:
            started: from `go`.
            loss: in nats, that all sides compare; where it takes work of its own, a function that
                is called when the clock has been read.
            more: other figures.
        """
        seconds = time.perf_counter() - started
        processor = time.process_time() - self._processor
        found = loss() if callable(loss) else loss
        self._say({"seconds": seconds, "processor": processor, "loss": float(found), **more})

    def end(self, **tail: Any) -> None:
        """All rounds are over; adds the peak of this process's resident memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._say({"end": True, "peak_bytes": peak, **tail})

    def _say(self, values: dict[str, Any]) -> None:
        self._out.write(json.dumps(values) + "\n")
