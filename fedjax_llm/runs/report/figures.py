"""The charts of a report: inline SVG whose colours are CSS variables, to follow the page.

Matplotlib draws with one stand-in colour per role; the stand-ins are then replaced in the SVG by
`var(--ink)`, `var(--series-0)` and so on, which the page defines for light and for dark.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

from fedjax_llm.runs.folder.metrics import RoundRecord

SERIES = 6
# What the page calls a colour -> its stand-in.
ROLES = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "page": "#040404",
    "bad": "#060606",
} | {f"series-{index}": f"#0505{index:02x}" for index in range(SERIES)}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "text.parse_math": False,  # a dollar sign in a cloud's name is a dollar sign
    "font.size": 12,
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": ROLES["muted"],
    "ytick.color": ROLES["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": ROLES["ink"],
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def losses(records: Sequence[RoundRecord]) -> str | None:
    """Held-out loss of each cloud over rounds; None when nothing was evaluated."""
    names = _cloud_names(records)
    lines = {
        name: [
            (record["round"], loss)
            for record in records
            if (loss := record.get("clouds", {}).get(name, {}).get("loss_eval_nats")) is not None
        ]
        for name in names
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), label=name, marker="o", **_line(index))
        axes.set_ylabel("nats per token")

    return _figure("losses", records, draw, legend=len(lines), wide=True)


def epsilon(records: Sequence[RoundRecord]) -> str | None:
    """Epsilon spent over rounds; None when it cannot be certified in any round."""
    points = [
        (record["round"], spent)
        for record in records
        if (spent := record.get("epsilon")) is not None
    ]
    if not points:
        return None

    def draw(axes: Any) -> None:
        xs, ys = zip(*points, strict=True)
        axes.fill_between(xs, ys, color=ROLES["series-3"], alpha=0.14, linewidth=0)
        axes.plot(xs, ys, marker="o", **_line(3))
        axes.annotate(
            f"{ys[-1]:.2f}",
            (xs[-1], ys[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
        )
        axes.set_ylim(0, max(ys) * 1.25 or 1)
        axes.set_ylabel("epsilon")

    return _figure("epsilon", records, draw)


def uplink(records: Sequence[RoundRecord], wide: bool = False) -> str | None:
    """Bytes that each cloud uploads per round, stacked; None when nothing was sent."""
    names = _cloud_names(records)
    rounds = [record for record in records if record.get("uplink_bytes")]
    if not rounds:
        return None
    sent = {
        name: [record["clouds"].get(name, {}).get("uplink_bytes") or 0 for record in rounds]
        for name in names
    }
    largest = max(sum(column) for column in zip(*sent.values(), strict=True))
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
        if largest >= scale
    )

    def draw(axes: Any) -> None:
        floor = [0.0] * len(rounds)
        for index, (name, values) in enumerate(sent.items()):
            heights = [value / scale for value in values]
            axes.bar(
                [record["round"] for record in rounds],
                heights,
                bottom=floor,
                width=0.55,
                label=name,
                color=ROLES[f"series-{index % SERIES}"],
                edgecolor=ROLES["page"],
                linewidth=1,
            )
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        axes.set_ylabel(f"{unit} per round")

    return _figure("uplink", records, draw, legend=len(sent), wide=wide)


def _figure(
    name: str,
    records: Sequence[RoundRecord],
    draw: Any,
    legend: int = 0,
    wide: bool = False,
) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        # Inches of a half and of a whole column of the page, so that text has one size in both.
        size = (13.4, 4.4) if wide else (6.4, 3.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        last = max((record["round"] for record in records), default=0)
        axes.set_xlim(-0.4 if name != "uplink" else 0.4, max(last, 1) + 0.6)
        if legend:
            columns = min(legend, 4)
            figure.legend(loc="outside upper left", ncols=columns, handlelength=1.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return themed(buffer.getvalue(), name)


def bounds(lower: float, upper: float) -> str:
    """One axis of epsilon from 0 to the larger bound: what an audit proves and what is promised."""
    last = max(lower, upper) or 1.0
    left, width = 14, 912

    def place(value: float) -> float:
        return left + width * value / last

    def mark(value: float, words: str, colour: str, y: int) -> str:
        x = place(value)
        third = int(3 * (x - left) / (width + 1))
        anchor = ("start", "middle", "end")[third]
        return (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="30" y2="54" stroke="{colour}" stroke-width="3"/>'
            f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="var(--ink)" '
            f'font-size="13">{words} {value:.2f}</text>'
        )

    first, second = sorted((lower, upper))
    between = place(second) - place(first)
    return (
        '<svg viewBox="0 0 940 84" xmlns="http://www.w3.org/2000/svg">'
        f'<line x1="{left}" x2="{left + width}" y1="42" y2="42" stroke="var(--grid)" '
        'stroke-width="2"/>'
        f'<rect x="{place(first):.1f}" y="37" width="{between:.1f}" height="10" '
        'fill="var(--series-0)" opacity="0.25"/>'
        + mark(lower, "at least", "var(--series-1)", 20)
        + mark(upper, "at most", "var(--series-0)", 74)
        + "</svg>"
    )


def themed(svg: str, name: str) -> str:
    """A drawing of matplotlib's as part of a page: no size, ids of its own, colours by role."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    # Ids are unique in a figure, not in a page that holds several.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*|(font: [\d.]+px) [^;\"]*", _inherit_font, svg)
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg


def _inherit_font(match: re.Match[str]) -> str:
    return f"{match.group(1)} var(--sans)" if match.group(1) else "font-family: var(--sans)"


def _line(index: int) -> dict[str, Any]:
    return {
        "color": ROLES[f"series-{index % SERIES}"],
        "linestyle": _DASHES[index // SERIES % len(_DASHES)],
        "linewidth": 2.2,
        "markersize": 4.5,
    }


def _cloud_names(records: Sequence[RoundRecord]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get("clouds", {})))
