"""What the first process of a run has the others do, in the order in which it does it itself.

The first one decides: how far the run had come, when it stops, what is evaluated. The others only
have to run the same programs at the same time. With one process all of this does nothing.
"""

import enum
import hashlib
import json

import numpy as np

from fedjax_llm.federation import processes
from fedjax_llm.runs.fingerprint import Fingerprint


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


def check_same(identity: Fingerprint) -> None:
    """Refuses processes that were given another model, other data or other settings.

    Raises:
      UserError: in all of them, naming those that differ from the first.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
    processes.check_same(digest, "model, data or settings")
