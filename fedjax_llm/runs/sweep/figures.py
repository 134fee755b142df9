"""What a cell measured, from the metrics of its run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.metrics import RoundRecord


@dataclass(frozen=True)
class Figures:
    """One cell's figures.

    Attributes:
      rounds: how many were run.
      seconds_command: of the whole command, start-up, compilation and report included.
      seconds_first_round: of the first round, which compiles; evaluation and checkpoint left out.
      seconds_round: median of the rounds after it; of the only one where there is one.
      tokens_round: positions trained on in a round, all clients; the median.
      tokens_per_second: median over the same rounds of a round's tokens over its seconds.
      peak_bytes: most memory that a process of the cell held.
      uplink_bytes: what clouds sent in a round, the median.
      loss_nats: held-out, after the last round; None where it was not finite.
    """

    rounds: int
    seconds_command: float
    seconds_first_round: float
    seconds_round: float
    tokens_round: float
    tokens_per_second: float
    peak_bytes: int
    uplink_bytes: float
    loss_nats: float | None


def of(records: Sequence[RoundRecord], seconds_command: float, peak_bytes: int) -> Figures:
    """The figures of a finished run.

    Args:
      records: of metrics.jsonl, round 0 included.
      seconds_command: measured from outside.
      peak_bytes: likewise.

    Raises:
      UserError: no round was run.
    """
    rounds = [record for record in records if record["round"] > 0]
    if not rounds:
        raise UserError("the run has no round to measure; raise rounds")
    steady = rounds[1:] or rounds
    return Figures(
        rounds=len(rounds),
        seconds_command=seconds_command,
        seconds_first_round=_seconds(rounds[0]),
        seconds_round=statistics.median(map(_seconds, steady)),
        tokens_round=statistics.median(record["tokens"] for record in steady),
        tokens_per_second=statistics.median(
            record["tokens"] / _seconds(record) for record in steady
        ),
        peak_bytes=peak_bytes,
        uplink_bytes=statistics.median(record["uplink_bytes"] for record in steady),
        loss_nats=rounds[-1].get("loss_eval_nats"),
    )


def _seconds(record: RoundRecord) -> float:
    """Of a round by itself: how often to evaluate and to keep is another question."""
    return (
        record["seconds_round"]
        - record.get("seconds_evaluate", 0.0)
        - record.get("seconds_checkpoint", 0.0)
    )


def speedups(
    xs: Sequence[float], found: Sequence[Figures], scaling: str
) -> list[tuple[float, float, float]]:
    """How much faster than the first place along an axis.

    Args:
      xs: of the axis, such as numbers of devices.
      found: at each.
      scaling: "strong" for the same work in less time, "weak" for more work in the same time; as
        work in a second both are one figure, and "strong" refuses work that differs.

    Returns:
      x, times as fast as at the first x, and that over the ideal x / first x.

    Raises:
      UserError: "strong" scaling of cells whose work differs by more than a tenth.
    """
    first = found[0]
    result = []
    for x, figures in zip(xs, found, strict=True):
        if scaling == "strong":
            if abs(figures.tokens_round / first.tokens_round - 1) > 0.1:
                raise UserError(
                    f"strong scaling compares the same work, and rounds have "
                    f'{first.tokens_round:g} and {figures.tokens_round:g} tokens; use "weak"'
                )
            times = first.seconds_round / figures.seconds_round
        else:
            times = figures.tokens_per_second / first.tokens_per_second
        result.append((x, times, times * xs[0] / x))
    return result


def from_json(values: dict[str, Any]) -> Figures:
    """Reads what `dataclasses.asdict` wrote."""
    return Figures(**values)
