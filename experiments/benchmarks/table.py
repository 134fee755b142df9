"""The rows of a benchmark: made, printed, written. Every benchmark in this folder imports it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def row(
    name: str, measured: float, unit: str, bar: float | None = None, least: bool = False
) -> Row:
    """One figure.

    Args:
        name: what was measured; those of one benchmark differ.
        measured: the figure.
        unit: of the figure and of the bar; "" for a ratio or a count.
        bar: what has been promised; None for nothing.
        least: the bar must be reached, rather than not be passed.
    """
    met = None if bar is None else bool(measured >= bar if least else measured <= bar)
    return {"name": name, "measured": measured, "bar": bar, "unit": unit, "met": met}


def show(rows: Sequence[Row]) -> None:
    """Prints rows as a table."""
    width = max((len(each["name"]) for each in rows), default=0)
    for each in rows:
        bar, met = "", ""
        if each["bar"] is not None:
            bar, met = f"bar {each['bar']:g}", "met" if each["met"] else "MISSED"
        measured = f"{_number(each['measured']):>12} {each['unit']:<8}"
        print(f"{each['name']:<{width}}  {measured} {bar:12} {met}".rstrip(), flush=True)


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Writes rows as JSON where a path is given."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n")


def _number(value: float) -> str:
    """Four digits, or all before the point.

    >>> _number(69120.0), _number(0.000123456), _number(12.3456)
    ('69,120', '0.0001235', '12.35')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < float("inf") else f"{value:.4g}"
