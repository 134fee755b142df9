"""timeline.json: who trained, sent, waited and failed when, in virtual seconds.

| key | what |
|---|---|
| seconds | when the last version was ready |
| rounds | server steps |
| clouds | of each: its name, seconds of each activity on either lane in the whole run, the lanes |
| steps | of the server: number, opened, closed, ready, attempts |
| cycle_fields, cycles | the passes of the clouds, see `clouds.timeline.Cycle`; null for never |
| cycles_total, until_s | of how many cycles; the moment up to which all of this is told |

Lanes are lists of [start, end, activity]. Of long runs lanes, steps and cycles end at `until_s`;
seconds of activities and `cycles_total` are those of the whole run. Nothing here reads a clock: a
run that is resumed writes the same.
"""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import metrics
from fedjax_llm.runs.folder.run_folder import RunFolder

if TYPE_CHECKING:
    from fedjax_llm.clouds.intervals import Interval
    from fedjax_llm.clouds.timeline import Timeline
    from fedjax_llm.federation.calendar import Calendar

# About a megabyte.
MOST_CYCLES = 5000


def write(folder: RunFolder, calendar: "Calendar", rounds: int) -> None:
    """Writes the timeline of the first rounds of a calendar."""
    presences = [cloud.presence for cloud in calendar.clouds]
    content = as_json(calendar.timeline.until(rounds), presences)
    folder.write(folder.timeline.name, json.dumps(content, allow_nan=False) + "\n")


def as_json(
    timeline: "Timeline", presences: Sequence[Any], most_cycles: int = MOST_CYCLES
) -> dict[str, Any]:
    """The content of the file.

    Args:
      timeline: of the run.
      presences: when each cloud is up; always if None.
      most_cycles: that are told.
    """
    from fedjax_llm.clouds.intervals import lanes, seconds_of
    from fedjax_llm.clouds.timeline import Cycle

    until = timeline.seconds
    if len(timeline.table_M) > most_cycles:
        until = float(sorted(timeline.table_M["start"])[most_cycles])
    clouds = [
        {
            "name": name,
            "seconds": {
                "compute": _known(seconds_of(own.compute)),
                "network": _known(seconds_of(own.network)),
            },
            "compute": _clipped(own.compute, until),
            "network": _clipped(own.network, until),
        }
        for name, own in zip(timeline.names, lanes(timeline, presences), strict=True)
    ]
    whole = len(timeline.table_M) <= most_cycles
    cycles = [c for c in timeline.cycles if whole or c.start < until]
    return {
        "seconds": timeline.seconds,
        "rounds": len(timeline.steps),
        "until_s": until,
        "cycles_total": len(timeline.table_M),
        "clouds": clouds,
        "steps": [step._asdict() for step in timeline.steps if step.ready <= until],
        "cycle_fields": list(Cycle._fields),
        "cycles": [
            metrics.strict([*cycle._replace(status=cycle.status.name.lower())])  # type: ignore[arg-type]
            for cycle in cycles
        ],
    }


def _known(seconds: dict[Any, float]) -> dict[str, float]:
    return {activity.value: value for activity, value in seconds.items() if value}


def _clipped(lane: Sequence["Interval"], until: float) -> list[list[Any]]:
    return [
        [start, min(end, until), activity.value] for start, end, activity in lane if start < until
    ]


def read(folder: RunFolder) -> dict[str, Any] | None:
    """What `write` wrote; None where there is none.

    Raises:
      UserError: the file is damaged.
    """
    if not folder.timeline.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(folder.timeline.read_bytes())
        ends = [own[lane][-1][1] for own in content["clouds"] for lane in ("compute", "network")]
        ends += [step["ready"] for step in content["steps"]]
        if not all(math.isfinite(end) and end <= content["until_s"] for end in ends):
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"{folder.timeline} is damaged or of another version; resume the run to write it again"
        ) from None
    return content
