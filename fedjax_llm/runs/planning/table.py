"""How a plan is shown: its candidates, the choice, and what is assumed."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.runs.planning.forecast import Forecast
from fedjax_llm.runs.planning.planner import Planned
from fedjax_llm.runs.text import bytes_text, seconds_text

_HEADS = (
    "schedule", "steps", "rank", "bits", "rounds", "80 % between", "time", "bytes", "dollars",
    "epsilon", "pilot",
)  # fmt: skip


def rows(planned: Planned) -> list[list[str]]:
    """A row for each forecast, the choice first."""
    return [_row(own) for own in planned.forecasts]


def _row(own: Forecast) -> list[str]:
    one = own.candidate
    steps = _by_cloud(one.cloud_steps) or str(one.local_steps)
    return [
        one.describe(),
        steps,
        _by_cloud(one.cloud_ranks) or str(one.rank),
        str(one.bits or "own"),
        str(own.rounds),
        f"{own.low} - {own.high}",
        seconds_text(own.seconds),
        bytes_text(int(own.bytes)),
        f"{own.dollars:.4g}",
        "" if own.epsilon is None else f"{own.epsilon:.3g}",
        f"{own.pilot_rounds} rounds" if own.pilot_rounds else "",
    ]


def _by_cloud(numbers: tuple[int, ...]) -> str:
    return "/".join(str(number) for number in numbers)


def assumptions(planned: Planned) -> list[str]:
    """What the forecast rests on, a sentence each."""
    plan = planned.run_file.plan
    assert plan is not None
    found = [
        f"{planned.candidates} candidates were simulated; time, bytes and dollars are those of the "
        "simulation that the run uses."
    ]
    if plan.target_tokens is not None:
        return [*found, "Tokens are counted, quality is not looked at: the cheapest way wins."]
    return [
        *found,
        f"Rounds come from the first rounds of {len(planned.forecasts)} candidates on this data, "
        "extended by a power law with saturation: a loss that bends later is not foreseen.",
        "Untried candidates are assumed to learn as much from a local step as the pilots tell of "
        "their choices.",
    ]


def show(console: Console, planned: Planned) -> None:
    """Prints a plan."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in _HEADS:
        table.add_column(Text(head), justify="left" if head == "schedule" else "right")
    for row in rows(planned):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    best = planned.chosen
    console.print(
        f"\nchosen: {best.candidate.describe()}, "
        f"{_by_cloud(best.candidate.cloud_steps) or best.candidate.local_steps} local steps, rank "
        f"{_by_cloud(best.candidate.cloud_ranks) or best.candidate.rank}"
        + ("" if best.noise is None else f", noise multiplier {best.noise:g}"),
        highlight=False,
    )
    for line in assumptions(planned):
        console.print(line, highlight=False)
