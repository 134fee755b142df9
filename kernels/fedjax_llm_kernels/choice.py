"""Which form of a kernel runs: by a table that measurements fill, never by belief.

Forms of a kernel agree up to rounding, and a federation's result must not hang on how busy a
machine was when it started. So there are two steps, apart from each other:

1. `of` answers from `BEST`, which is part of the program: for a (kernel, device kind) that has been
   measured, its faster form; for every other, "xla". All kernels ask here, unless told.
2. `Choices` measures: both forms of a kernel, for the shapes and the device at hand, once. It
   remembers in memory and, given a folder, on disk; a choice that is on disk is never measured
   again, so that what resumes from the folder goes on with the same forms.

How to fill the table: on the device, run `experiments/benchmarks/kernels.py --choices FOLDER`,
which writes `kernel_choices.json`; then enter the form that won for the shapes that matter, with
date and figures in `kernels/README.md`. On a CPU the answer is always "xla" and nothing is timed:
Pallas is interpreted there, for tests.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from .pallas_forms import Implementation, check_implementation

# (kernel, device kind as JAX names it) -> the faster form. No accelerator has been measured yet.
BEST: Mapping[tuple[str, str], Implementation] = {}
FILE = "kernel_choices.json"


def of(kernel: str, asked: Implementation | None) -> Implementation:
    """The form that was asked for, or else the table's for the default device.

    Raises:
      ValueError: What was asked for is no form.
    """
    check_implementation(asked)
    if asked is not None:
        return asked
    return BEST.get((kernel, jax.devices()[0].device_kind), "xla")


def device_of(array: jax.Array) -> jax.Device:
    """The device that an array lies on, one of them if there are several."""
    return next(iter(array.devices()))


def times(run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> list[float]:
    """Wall seconds of each call, its results waited for; one before them compiles."""
    jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(time.perf_counter() - started)
    return found


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int = 7) -> float:
    """Median wall seconds of a call."""
    return statistics.median(times(run, arguments, repeats))


class Choices:
    """What has been measured on this machine.

    One writer for each folder: the last one to write wins.
    """

    def __init__(
        self,
        folder: Path | None = None,
        timer: Callable[[Callable[..., Any], tuple[Any, ...]], float] = seconds,
    ) -> None:
        """Reads what the folder holds.

        Args:
          folder: Where `kernel_choices.json` lies or will lie; None keeps choices in memory.
          timer: Seconds of a compiled form on its arguments.

        Raises:
          ValueError: The file is not one of choices.
        """
        self._path = None if folder is None else Path(folder) / FILE
        self._timer = timer
        self._known: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            self._known = _read(self._path)

    def pick(
        self, kernel: str, forms: Mapping[Implementation, Callable[..., Any]], *arguments: Any
    ) -> Implementation:
        """The faster form for these arguments; timed unless it is known, or the device is a CPU.

        Must be called outside of a trace. A Pallas form that does not compile or run on the device
        loses, and the record says why.

        Args:
          kernel: Its name, with all but the arrays that its time depends on: bits, a gradient.
          forms: "xla" and "pallas": the kernel with all but the arrays bound.
          arguments: Arrays, all on one device.
        """
        leaves = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(arguments)]
        device = device_of(leaves[0])
        if device.platform == "cpu":
            return "xla"
        shapes = " ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
        key = f"{kernel} | {device.device_kind} | {shapes}"
        if key not in self._known:
            self._known[key] = self._measured(forms, arguments)
            if self._path is not None:
                _write(self._path, self._known)
        chosen: Implementation = self._known[key]["chosen"]
        return chosen

    def _measured(
        self, forms: Mapping[Implementation, Callable[..., Any]], arguments: tuple[Any, ...]
    ) -> dict[str, Any]:
        xla = self._timer(jax.jit(forms["xla"]), arguments)
        try:
            pallas = self._timer(jax.jit(forms["pallas"]), arguments)
        except Exception as error:
            # Whatever a compiler for a device that was not tried raises; it is kept, not hidden.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return {"chosen": "xla", "xla_seconds": xla, "pallas_failed": reason}
        chosen = "pallas" if pallas < xla else "xla"
        return {"chosen": chosen, "xla_seconds": xla, "pallas_seconds": pallas}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(path.read_text())
        for entry in known.values():
            check_implementation(entry["chosen"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no choices of kernels ({error}); remove it to measure again"
        ) from error
    found: dict[str, dict[str, Any]] = known
    return found


def _write(path: Path, known: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
