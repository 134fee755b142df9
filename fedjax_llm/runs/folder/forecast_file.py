"""plan.json: what the plan that wrote a run file expected, beside the run that tells what came."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import metrics
from fedjax_llm.runs.folder.run_folder import RunFolder
from fedjax_llm.runs.sections.schema import RunFile

FILE = "plan.json"
# What a forecast and an outcome have in common.
MEASURES = ("seconds", "bytes", "dollars", "rounds")


@dataclass(frozen=True)
class Outcome:
    """What a run took; see `ForecastSection` for the words."""

    seconds: float
    bytes: int
    dollars: float
    rounds: int


def record(folder: RunFolder, run_file: RunFile) -> None:
    """Writes plan.json if the run file carries a forecast."""
    plan = run_file.plan
    if plan is None or plan.forecast is None:
        return
    content = {
        "target_loss": plan.target_loss,
        "target_tokens": plan.target_tokens,
        "minimise": plan.minimise,
        "forecast": plan.forecast.model_dump(),
    }
    folder.write(FILE, json.dumps(content, indent=2) + "\n")


def read(folder: RunFolder) -> dict[str, Any] | None:
    """The content of plan.json; None for a run that was not planned.

    Raises:
        UserError: it is not what `record` writes.
    """
    path = folder.path / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        if all(isinstance(content["forecast"][name], int | float) for name in MEASURES):
            return dict(content)
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged; resume the run to write it again")


def outcome(folder: RunFolder) -> Outcome:
    """What the rounds of a run folder took, by its metrics."""
    records = [own for own in metrics.read(folder.metrics) if own["round"] > 0]
    if not records:
        raise UserError(f"{folder.path} has no finished round to compare with its forecast")
    return Outcome(
        sum(own["seconds_virtual"] for own in records),
        sum(own["uplink_bytes"] + own["downlink_bytes"] for own in records),
        sum(own["dollars"] for own in records),
        records[-1]["round"],
    )


def ratios(forecast: Mapping[str, float], came: Outcome) -> dict[str, float]:
    """Forecast over outcome, by measure; 1 where both are 0, as money without prices.

    >>> ratios({"seconds": 9, "bytes": 5, "dollars": 0, "rounds": 3}, Outcome(10.0, 5, 0.0, 3))
    {'seconds': 0.9, 'bytes': 1.0, 'dollars': 1.0, 'rounds': 1.0}
    """
    found = {}
    for name, value in asdict(came).items():
        own = float(forecast[name])
        found[name] = own / value if value else (1.0 if own == 0 else float("inf"))
    return found
