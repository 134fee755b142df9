"""Forecast of `fedjax-llm plan` against the run that it chose: time, bytes, dollars, rounds.

  command   python experiments/benchmarks/clouds_plan.py [--case NAME] [--json FILE]

  machine   2 cores of a virtual machine that others used as well, JAX on the CPU
  time      2 to 5 minutes a case
  result    forecast over outcome, after a pilot of so many rounds and a run of so many:

            case                                   pilot   run   time   bytes  dollars
            seconds to 1.8                            13    13   1.000  1.003  1.000
            dollars to 1.6                            16    19   1.000  1.003  1.000
            bytes to 1.8, synchronous                  6     6   1.000  1.002  1.000
            bytes to 1.6, synchronous, pilot of 8      8    10   1.000  1.002  1.000
            seconds to 3.4, epsilon 8                 28    30   1.100  1.103  1.100

Every case plans experiments/cross_cloud/plan.toml on stories260K for another objective and target,
runs the run file of the choice to its target, and compares. Where pilot and run are as long, the
pilot got to the target itself and nothing was left to forecast; the others look ahead.

With 12 rounds of pilot the private case was forecast at 73 rounds, between 28 and 146, and came at
38: under noise a short pilot says little, which its interval shows.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import Row, row, show, write

from fedjax_llm.errors import FedJaxError
from fedjax_llm.runs import job, planning, runfile
from fedjax_llm.runs.events import Event, Note
from fedjax_llm.runs.folder import RunFolder, forecast_file

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = ROOT / "experiments" / "cross_cloud" / "plan.toml"
MODEL = ROOT.parent / "shared" / "models" / "stories260K"
# The bar: off by at most a fifth.
BAR = 0.2


@dataclass(frozen=True)
class Case:
    """A target and what is minimised on the way to it.

    Attributes:
        name: of the case.
        settings: overrides of the run file.
    """

    name: str
    settings: tuple[str, ...]


def _case(name: str, minimise: str, target: float, *more: str) -> Case:
    own = (f"plan.minimise={minimise}", f"plan.target_loss={target}")
    return Case(name, (*own, "plan.pilots=4", "plan.max_pilot_rounds=16", *more))


CASES = (
    _case("seconds to 1.8", "seconds", 1.8),
    _case("dollars to 1.6", "dollars", 1.6),
    _case("bytes to 1.8, synchronous", "bytes", 1.8, 'plan.schedules=["synchronous"]'),
    _case(
        "bytes to 1.6, synchronous, pilot of 8",
        "bytes",
        1.6,
        'plan.schedules=["synchronous"]',
        "plan.pilots=2",
        "plan.max_pilot_rounds=8",
    ),
    _case(
        "seconds to 3.4, epsilon 8",
        "seconds",
        3.4,
        'plan.schedules=["synchronous", "deadline"]',
        "plan.pilots=2",
        "plan.max_pilot_rounds=32",
        "privacy.unit=example",
        "privacy.clip_norm=1.0",
        "privacy.noise_multiplier=0.8",
        "privacy.delta=1e-4",
        "privacy.budget=8.0",
    ),
)


@dataclass(frozen=True)
class Compared:
    """A forecast and what came.

    Attributes:
        case: of what.
        choice: in words.
        pilot_rounds: that the forecast was made from.
        forecast: by measure.
        outcome: by measure.
        ratios: forecast over outcome.
        reached: whether the run ended at its target.
    """

    case: str
    choice: str
    pilot_rounds: int
    forecast: dict[str, float]
    outcome: dict[str, float]
    ratios: dict[str, float]
    reached: bool


def compare(case: Case, out: Path, *, model: Path = MODEL, note: Callable[[str], None]) -> Compared:
    """Plans a case and runs what was chosen.

    Args:
        case: of `CASES`, or another.
        out: an empty folder for the run.
        model: a model folder.
        note: is told what happens.
    """

    def tell(event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith(("pilot", "left out")):
            note(event.text)

    own = [f"model={{path={str(model)!r}}}", *case.settings]
    planned = planning.make(runfile.load(RUN_FILE, own), on_event=tell)
    run_file, best = planned.run_file, planned.chosen
    with RunFolder.create(out, runfile.to_toml(run_file)) as folder:
        result = job.run(run_file, folder)
        kept = forecast_file.read(folder)
        came = forecast_file.outcome(folder)
    assert kept is not None
    one = best.candidate
    return Compared(
        case.name,
        f"{one.describe()}, steps {one.cloud_steps or one.local_steps}, rank {one.rank}, bits "
        f"{one.bits or 'own'}",
        best.pilot_rounds,
        {name: float(kept["forecast"][name]) for name in forecast_file.MEASURES},
        {name: float(getattr(came, name)) for name in forecast_file.MEASURES},
        forecast_file.ratios(kept["forecast"], came),
        result.rounds < run_file.rounds or best.high == best.rounds,
    )


def forecasts(
    out: Path,
    cases: Sequence[Case] = CASES,
    *,
    model: Path = MODEL,
    note: Callable[[str], None] = print,
) -> list[Compared]:
    """Plans and runs all cases, each in a folder of its own below `out`."""
    found = []
    for place, case in enumerate(cases):
        try:
            found.append(compare(case, out / f"case-{place}", model=model, note=note))
        except FedJaxError as error:
            note(f"{case.name}: {error}")
            raise
        note(f"{case.name}: {found[-1]}")
    return found


def rows(found: Sequence[Compared]) -> list[Row]:
    """How far each forecast was off, as a part of the outcome; the bar is a fifth."""
    made: list[Row] = []
    for own in found:
        for name, ratio in own.ratios.items():
            bar = None if name == "rounds" else BAR
            made.append(row(f"{own.case}: {name}, off by", abs(ratio - 1), "", bar))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path)
    asked: Any = parser.parse_args()
    cases = [case for case in CASES if asked.case is None or case.name in asked.case]
    with tempfile.TemporaryDirectory() as folder:
        found = rows(forecasts(Path(folder), cases, model=asked.model))
    show(found)
    write(found, asked.json)


if __name__ == "__main__":
    main()
