"""The cards "Timeline" and "Money" of a report, from timeline.json, summary.json and plan.json."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedjax_llm.runs import text
from fedjax_llm.runs.folder import forecast_file
from fedjax_llm.runs.folder.virtual import Virtual
from fedjax_llm.runs.report import figures

# Rows of a drawing that can still be told apart, and its intervals, about 200 bytes each.
MOST_CLOUDS = 24
MOST_INTERVALS = 1500
# Activity -> what the page calls its colour, in the order of the legend.
COLOURS = {
    "trains": "series-0",
    "receives": "series-2",
    "sends": "series-1",
    "opens": "series-3",
    "waits": "grid",
    "lost": "bad",
    "down": "muted",
}


@dataclass(frozen=True)
class TimelineCard:
    """What the template shows.

    Attributes:
      svg: the drawing.
      words: which clouds and which part of the run it shows.
      activities: columns of the table: lane and activity.
      rows: of each cloud shown, seconds of each activity in the whole run as texts.
    """

    svg: str
    words: str
    activities: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class MoneyRow:
    """One payer; `name` is text of the run file."""

    name: str
    paid: Any


@dataclass(frozen=True)
class MoneyCard:
    """What the template shows.

    Attributes:
      rows: who pays; the dearest clouds and the server.
      others: words on the clouds that are left out.
      most: dollars of the dearest payer, at which a bar is full.
      compared: of the forecast, by measure: its name, forecast, outcome, forecast over outcome.
    """

    rows: tuple[MoneyRow, ...]
    others: str
    most: float
    compared: tuple[tuple[str, str, str, str], ...]


def timeline_card(content: dict[str, Any] | None, finished: bool = True) -> TimelineCard | None:
    """The card of a timeline.

    Args:
      content: of timeline.json.
      finished: whether the run has ended; before, the timeline is what is to come, too.
    """
    if content is None or not content["seconds"]:
        return None
    shown = most_telling(content["clouds"], MOST_CLOUDS)
    until, steps = window(content, shown)
    words = _words(content, len(shown), until, steps, finished)
    used = [
        (lane, activity)
        for lane, of_lane in (("compute", "trains lost"), ("network", "receives sends opens lost"))
        for activity in of_lane.split()
        if any(activity in own["seconds"][lane] for own in shown)
    ]
    return TimelineCard(
        _drawing(shown, [s["ready"] for s in content["steps"][:steps]], until),
        words,
        (*(_column(*own) for own in used), "down"),
        tuple(
            (
                own["name"],
                tuple(_spent(own["seconds"][lane].get(kind), content["seconds"])
                      for lane, kind in (*used, ("compute", "down"))),
            )
            for own in shown
        ),
    )  # fmt: skip


def most_telling(clouds: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The clouds that were down or lost work the longest, then those that trained least.

    They stay in the order of the run.
    """

    def rank(place: int) -> tuple[float, float]:
        seconds = clouds[place]["seconds"]["compute"]
        return -seconds.get("down", 0.0) - seconds.get("lost", 0.0), seconds.get("trains", 0.0)

    chosen = sorted(sorted(range(len(clouds)), key=rank)[:most])
    return [clouds[place] for place in chosen]


def window(content: dict[str, Any], shown: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Up to when a drawing goes that has few enough intervals, and how many steps are over then."""
    starts = sorted(s for own in shown for lane in ("compute", "network") for s, _, _ in own[lane])
    until = content["until_s"]
    if len(starts) > MOST_INTERVALS:
        until = starts[MOST_INTERVALS]
    whole = [step["ready"] for step in content["steps"] if step["ready"] <= until]
    if whole and until < content["seconds"]:
        until = whole[-1]
    return until, len(whole)


def _words(content: dict[str, Any], clouds: int, until: float, steps: int, finished: bool) -> str:
    count, rounds = len(content["clouds"]), content["rounds"]
    words = f"In virtual time, {text.seconds_text(content['seconds'])} in all."
    if clouds < count:
        words += (
            f" Of {count:,} clouds the {clouds} that were down or lost work the longest, then "
            "those that trained least."
        )
    if until < content["seconds"]:
        words += (
            f" The first {text.seconds_text(until)}, {steps:,} of {rounds:,} steps; the table is "
            "of the whole run."
        )
    if not finished:
        words += " As it was planned before the run, which has not ended."
    return words


def _column(lane: str, activity: str) -> str:
    return activity if activity != "lost" else ("lost work" if lane == "compute" else "lost bytes")


def _spent(seconds: float | None, whole: float) -> str:
    if not seconds:
        return "–"
    return f"{text.seconds_text(seconds)} · {text.share_text(seconds / whole)}"


def _drawing(shown: Sequence[dict[str, Any]], ready: Sequence[float], until: float) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    unit, scale = next(
        (unit, scale)
        for unit, scale in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if until >= 2 * scale or scale == 1
    )
    roles, used = figures.ROLES, set[str]()
    style = {**figures.STYLE, "svg.hashsalt": "timeline", "axes.grid": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13.4, 1.7 + 0.5 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for moment in ready:
            axes.axvline(moment / scale, color=roles["muted"], linewidth=0.6, zorder=0.5)
        for row, own in enumerate(shown):
            for lane, top in (("compute", row - 0.34), ("network", row + 0.04)):
                spans: dict[str, list[tuple[float, float]]] = {}
                for start, end, activity in own[lane]:
                    if start < until:
                        span = (start / scale, (min(end, until) - start) / scale)
                        spans.setdefault(activity, []).append(span)
                for activity, found in spans.items():
                    colour = roles[COLOURS[activity]]
                    axes.broken_barh(found, (top, 0.3), facecolor=colour, linewidth=0, zorder=1)
                    used.add(activity)
        axes.set_yticks(range(len(shown)), [own["name"] for own in shown])
        axes.tick_params(axis="y", labelcolor=roles["ink"])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, until / scale)
        axes.set_xlabel(f"virtual {unit}; above compute, below network; lines are server steps")
        handles = [
            Patch(facecolor=roles[colour], label=activity)
            for activity, colour in COLOURS.items()
            if activity in used
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=7, handlelength=1.0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return figures.themed(buffer.getvalue(), "timeline")


def money_card(
    virtual: Virtual | None,
    forecast: dict[str, Any] | None,
    outcome: forecast_file.Outcome | None,
) -> MoneyCard | None:
    """The card of the money; None for a run that has not ended.

    Args:
      virtual: of the summary.
      forecast: content of plan.json, for a run that was planned.
      outcome: what its rounds took.
    """
    if virtual is None:
        return None
    dearest = sorted(virtual.clouds, key=lambda name: -virtual.clouds[name].dollars)[:MOST_CLOUDS]
    names = [name for name in virtual.clouds if name in dearest]
    rows = [MoneyRow(name, virtual.clouds[name]) for name in names]
    left = [own for name, own in virtual.clouds.items() if name not in dearest]
    others = ""
    if left:
        dollars = text.dollars_text(sum(own.dollars for own in left))
        others = f"{len(left):,} cheaper clouds pay {dollars} together."
    return MoneyCard(
        (*rows, MoneyRow("server", virtual.server)),
        others,
        max(row.paid.dollars for row in (*rows, MoneyRow("", virtual.server))),
        () if forecast is None or outcome is None else _compared(forecast["forecast"], outcome),
    )


def _compared(
    forecast: dict[str, Any], outcome: forecast_file.Outcome
) -> tuple[tuple[str, str, str, str], ...]:
    ratios = forecast_file.ratios(forecast, outcome)
    shown = {
        "seconds": text.seconds_text,
        "bytes": text.bytes_text,
        "dollars": text.dollars_text,
        "rounds": lambda count: f"{count:.0f}",
    }
    return tuple(
        (name, shown[name](forecast[name]), shown[name](getattr(outcome, name)), f"{ratio:.2f}")
        for name, ratio in ratios.items()
    )
