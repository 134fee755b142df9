"""metrics.jsonl: one line of strict JSON per round, units in the key names.

Only the last line can be torn (the process died while writing it); it is dropped when read, and
cut off before anything is appended. JSON has no NaN or infinity: a value that is not finite is
written as null, with the reason beside it under the key plus `_reason` (`epsilon: null`,
`epsilon_reason: "infinite"`), unless the record already gives one.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import disk


class CloudRecord(TypedDict, total=False):
    """One cloud's part of a round. Losses are nats per target token, sizes bytes."""

    loss_eval_nats: float | None
    loss_train_nats: float | None
    examples: int
    uplink_bytes: int
    downlink_bytes: int
    epsilon: float | None
    epsilon_reason: str
    seconds_link: float
    seconds_train_virtual: float
    dollars: float
    lands: bool


class RoundRecord(TypedDict, total=False):
    """One line of metrics.jsonl. Round 0 is the evaluation before training: only `loss_eval_nats`.

    `seconds_virtual` is simulated time (link and training on the clouds' own clocks), `dollars` is
    what clouds and server pay in it.
    """

    round: int
    loss_eval_nats: float | None
    loss_train_nats: float | None
    epsilon: float | None
    epsilon_reason: str
    delta: float
    uplink_bytes: int
    downlink_bytes: int
    seconds_train: float
    seconds_encrypt: float
    seconds_add: float
    seconds_decrypt: float
    seconds_evaluate: float
    seconds_checkpoint: float
    seconds_round: float
    seconds_virtual: float
    dollars: float
    dollars_server: float
    tokens: int
    tokens_per_second: float
    update_norm: float | None
    aggregation_error: float | None
    clipped_fraction: float | None
    clouds_diverged: int
    clouds: dict[str, CloudRecord]


# Fields that read a clock and are not recognised by their prefix.
CLOCK_FIELDS = frozenset({"tokens_per_second"})

# Those that a secure sum takes: making uploads, adding them, opening the sum.
SECURE_STAGES = ("encrypt", "add", "decrypt")

# Stages of a round that take real time, in the order in which they happen.
STAGES = ("train", *SECURE_STAGES, "evaluate", "checkpoint")


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without its clock readings, at every depth: what two equal runs agree on.

    >>> without_clock({"round": 1, "seconds_train": 2.5, "clouds": {"a": {"seconds_link": 1.0}}})
    {'round': 1, 'clouds': {'a': {}}}
    """
    return {
        key: without_clock(value) if isinstance(value, Mapping) else value
        for key, value in record.items()
        if not key.startswith("seconds_") and key not in CLOCK_FIELDS
    }


def strict(value: Any) -> Any:
    """Plain JSON types only; numbers that are not finite become null plus a reason.

    >>> strict({"epsilon": float("inf")})
    {'epsilon': None, 'epsilon_reason': 'infinite'}
    """
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            item = _number(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[key] = None
                if f"{key}_reason" not in value:
                    plain[f"{key}_reason"] = "not a number" if math.isnan(item) else "infinite"
            else:
                plain[key] = strict(item)
        return plain
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    value = _number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def append(path: Path, record: RoundRecord) -> None:
    """Adds one round and returns when it is on the disk.

    Raises:
      UserError: the disk is full; the rounds before are intact.
    """
    line = json.dumps(strict(record), allow_nan=False, ensure_ascii=False) + "\n"
    with disk.full_disk_is_a_user_error(path):
        whole = _whole_bytes(path)
        with path.open("ab") as file:
            file.truncate(whole)
            try:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), whole)
                raise


def read(path: Path) -> list[RoundRecord]:
    """All whole lines of a metrics file; an empty list when there is none yet.

    Raises:
      UserError: a line other than a torn last one is not JSON; names the line.
    """
    if not path.exists():
        return []
    records: list[RoundRecord] = []
    for number, line in enumerate(path.read_bytes()[: _whole_bytes(path)].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("round"), int):
            raise UserError(f"{path}:{number}: not a round's metrics; the file was changed by hand")
        records.append(record)  # type: ignore[arg-type]
    return records


def truncate(path: Path, last_round: int) -> list[RoundRecord]:
    """Drops the rounds after `last_round` (-1: all) by an atomic rewrite; returns those that stay.

    A resumed run calls it with the checkpoint's round, because the round after it may have been
    recorded before the process died.
    """
    records = read(path)
    kept = [record for record in records if record["round"] <= last_round]
    if path.exists() and (len(kept) < len(records) or _whole_bytes(path) < path.stat().st_size):
        lines = path.read_bytes().splitlines(keepends=True)[: len(kept)]
        disk.atomic_write(path, b"".join(lines))
    return kept


def _whole_bytes(path: Path) -> int:
    """The length of the file up to and including its last line break."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
