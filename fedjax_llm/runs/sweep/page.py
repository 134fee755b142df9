"""A sweep on one page, and the drawing beside it."""

import html
from collections.abc import Sequence
from pathlib import Path

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import disk
from fedjax_llm.runs.sweep.drawing import draw
from fedjax_llm.runs.sweep.file import SweepFile
from fedjax_llm.runs.sweep.running import Outcome
from fedjax_llm.runs.sweep.table import rows

PLOT, PAGE = "scaling.svg", "summary.html"


def write(sweep: SweepFile, outcomes: Sequence[Outcome], out: Path) -> Path:
    """Writes the drawing and the page, and returns the page's path.

    Raises:
      UserError: the disk is full.
    """
    try:
        svg = draw(sweep.plot, outcomes) if sweep.plot is not None else None
        note = ""
    except UserError as error:
        svg, note = None, f"nothing is drawn: {error}"
    if svg is not None:
        disk.atomic_write(out / PLOT, svg)
    disk.atomic_write(out / PAGE, page(sweep, outcomes, svg, note))
    return out / PAGE


def page(sweep: SweepFile, outcomes: Sequence[Outcome], svg: str | None, note: str = "") -> str:
    """One HTML file that asks nothing of any network."""
    heads, body = rows(outcomes)
    failed = [outcome for outcome in outcomes if outcome.error]
    machines = {
        ", ".join(f"{key} {value}" for key, value in outcome.machine.items() if key != "devices")
        for outcome in outcomes
        if outcome.machine
    }
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + "</tr>\n"
        for words in body
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        f"<title>{html.escape(sweep.name)}</title>\n"
        "<style>body{font:16px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;"
        "border-bottom:1px solid #ddd}svg{max-width:100%;height:auto}</style>\n"
        f"<h1>{html.escape(sweep.name)}</h1>\n"
        f"<p>{len(outcomes)} cells of {html.escape(Path(sweep.run).name)}, {len(failed)} failed. "
        "A round is the median of those after the first, without evaluation and checkpoint.</p>\n"
        + (svg[svg.index("<svg") :] if svg else "")
        + (f"<p>{html.escape(note)}</p>\n" if note else "")
        + "<table><tr>"
        + "".join(f"<th>{html.escape(head)}</th>" for head in heads)
        + f"</tr>\n{cells}</table>\n"
        + "".join(
            f"<p>{html.escape(own.cell.describe())}: {html.escape(own.error)}</p>\n"
            for own in failed
        )
        + "".join(f"<p>{html.escape(machine)}</p>\n" for machine in sorted(machines))
        + "</html>\n"
    )
