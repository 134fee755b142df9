"""A sweep as a drawing: figures along one axis, or how far they scale."""

import io
from collections.abc import Sequence
from typing import Any

from fedjax_llm.runs.sweep.figures import Figures, speedups
from fedjax_llm.runs.sweep.file import PlotSection
from fedjax_llm.runs.sweep.running import Outcome

Lines = dict[str, list[tuple[float, Figures]]]
Panels = dict[str, dict[str, list[tuple[float, float]]]]


def lines(outcomes: Sequence[Outcome], x: str) -> Lines:
    """The figures along an axis, by the values of the others; failed cells are left out."""
    found: Lines = {}
    for outcome in outcomes:
        if outcome.figures is not None:
            others = [f"{k} {v}" for k, v in outcome.cell.values.items() if k != x]
            place = float(outcome.cell.values[x])
            found.setdefault(", ".join(others), []).append((place, outcome.figures))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def draw(section: PlotSection, outcomes: Sequence[Outcome]) -> str | None:
    """An SVG of its own; None where there is nothing to draw.

    Raises:
      UserError: strong scaling of cells whose work differs.
    """
    import matplotlib
    from matplotlib.figure import Figure

    found = lines(outcomes, section.x)
    if not found:
        return None
    panels = _scaling(section.scaling, found) if section.scaling else _as_they_are(found)
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "font.size": 11, "axes.grid": True}):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        for axes, (label, drawn) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                        panels.items(), strict=True):  # fmt: skip
            for name, points in drawn.items():
                style = {"color": "grey", "linestyle": ":"} if name == "ideal" else {"marker": "o"}
                axes.plot(*zip(*points, strict=True), label=name, **style)
            xs = sorted({x for points in drawn.values() for x, _ in points})
            if xs[0] > 0 and xs[-1] >= 4 * xs[0]:
                axes.set_xscale("log")
                axes.set_xticks(xs, [f"{x:g}" for x in xs])
                axes.minorticks_off()
            ys = [y for points in drawn.values() for _, y in points]
            if min(ys) > 0 and max(ys) > 20 * min(ys):
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.08 * max(ys))
            axes.set_xlabel(section.x)
            axes.set_ylabel(label)
            if any(drawn):
                axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _as_they_are(found: Lines) -> Panels:
    def of(get: Any) -> dict[str, list[tuple[float, float]]]:
        return {name: [(x, get(own)) for x, own in points] for name, points in found.items()}

    return {
        "seconds a round": of(lambda own: own.seconds_round),
        "tokens a second": of(lambda own: own.tokens_per_second),
        "peak memory, GB": of(lambda own: own.peak_bytes / 1e9),
    }


def _scaling(scaling: str, found: Lines) -> Panels:
    times: dict[str, list[tuple[float, float]]] = {}
    shares: dict[str, list[tuple[float, float]]] = {}
    for name, points in found.items():
        xs, own = zip(*points, strict=True)
        measured = speedups(xs, own, scaling)
        times[name] = [(x, faster) for x, faster, _ in measured]
        shares[name] = [(x, share) for x, _, share in measured]
    places = sorted({x for points in found.values() for x, _ in points})
    ideal = [(x, x / places[0]) for x in places]
    return {
        f"times as fast ({scaling} scaling)": times | {"ideal": ideal},
        "of the ideal": shares | {"ideal": [(x, 1.0) for x in places]},
    }
