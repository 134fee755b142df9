"""What the first process of a run has the others do, in the order in which it does it itself.

The first one decides: how far the run had come, when it stops, what is evaluated. The others only
have to run the same programs at the same time. With one process all of this does nothing.
"""

import enum
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np

from fedjax_llm.federation import processes
from fedjax_llm.runs.folder.fingerprint import Fingerprint
from fedjax_llm.runs.sections.schema import RunFile

# Keys of the run file that name files.
_PLACES = {"path", "sources", "map", "measure_on", "traces", "trace", "tokenizer", "catalogue"}


class Order(enum.IntEnum):
    """What comes next; `BEGIN` comes first, when the model is there to be loaded."""

    END = 0
    BEGIN = 1
    ROUND = 2
    EVALUATE = 3


def give(order: Order) -> None:
    """Tells the others what comes next; only the first process calls it."""
    processes.from_first(np.int32(order))


def take() -> Order:
    """Waits for what comes next; only the others call it."""
    return Order(int(processes.from_first(np.int32(0))))


def shared_secret(secret: bytes) -> bytes:
    """The first process's secret root of noise and samples, in all processes.

    It travels as every array does, over the network of the run.

    Args:
      secret: the root; in the others only its length counts.
    """
    if not processes.several():
        return secret
    told: bytes = processes.from_first(np.frombuffer(secret, np.uint8)).tobytes()
    return told


def shared_count(count: int | None) -> int | None:
    """A number above 0 of the first process, or None, in all processes."""
    return int(processes.from_first(np.int32(count or 0))) or None


def check_same(identity: Fingerprint, run_file: RunFile) -> None:
    """Refuses processes that were given another model, other data or other settings.

    All settings count, those too that a run may change when it is resumed: a process for which
    another cloud is offline, or that divides its work in another way, would compute something else
    under the same name. Of files it is the content that counts, which the fingerprint has.

    Args:
      identity: the fingerprint of model, data and settings.
      run_file: all settings.

    Raises:
      UserError: in all of them, naming those that differ from the first.
    """
    settings = _without_paths(run_file.model_dump(mode="json"))
    flags = {"jax": jax.__version__, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    told = json.dumps([identity, settings, flags], sort_keys=True)
    processes.check_same(
        hashlib.sha256(told.encode()).digest(), "model, data, settings, JAX or XLA_FLAGS"
    )


def _without_paths(value: Any) -> Any:
    """Settings without the places of files, which may differ by machine."""
    if isinstance(value, dict):
        return {key: _without_paths(own) for key, own in value.items() if key not in _PLACES}
    return [_without_paths(own) for own in value] if isinstance(value, list) else value
