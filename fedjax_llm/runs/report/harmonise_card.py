"""The card of a report that says what was changed in the data, by cloud."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Parts of a bar beside what stayed; the page defines so many colours.
STAGES = 6


@dataclass(frozen=True)
class Part:
    """One part of a cloud's bar.

    Attributes:
      name: The step that took the rows, or "kept".
      rows: How many.
      percent: Of the rows that were read.
      colour: Name of a colour of the page.
    """

    name: str
    rows: int
    percent: float
    colour: str


@dataclass(frozen=True)
class CloudCard:
    """What became of one cloud's rows.

    Attributes:
      name: The cloud.
      rows_in: Rows read.
      rows_out: Rows left for training and evaluation, copies included.
      added: Copies among them.
      parts: What was read, by what became of it; they add up to `rows_in`.
      notes: What was done, step by step, in words.
    """

    name: str
    rows_in: int
    rows_out: int
    added: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def cards(found: dict[str, Any] | None) -> list[CloudCard]:
    """One card for each cloud, from what `harmonise_file.read` gives; none without harmonisation.

    A step has one colour at all clouds; steps beyond the page's colours share the last.
    """
    if found is None:
        return []
    whole = {"the corpus before it was divided": found["whole"]} if found["whole"] else {}
    books = whole | found["clouds"]
    lossy = dict.fromkeys(s["name"] for steps in books.values() for s in steps if s["dropped"])
    colour = {name: f"stage-{min(i, STAGES - 1)}" for i, name in enumerate(lossy)}
    return [_card(name, steps, colour) for name, steps in books.items() if steps]


def _card(name: str, steps: Sequence[dict[str, Any]], colour: dict[str, str]) -> CloudCard:
    rows_in = steps[0]["rows_in"]
    gone = {s["name"]: sum(s["dropped"].values()) for s in steps if s["dropped"]}
    kept = rows_in - sum(gone.values())
    counts = [("kept", kept, "accent"), *((n, rows, colour[n]) for n, rows in gone.items())]
    notes = []
    for step in steps:
        words = [f"{rows:,} dropped ({why})" for why, rows in step["dropped"].items()]
        words += [f"{step['changed']:,} changed"] if step["changed"] else []
        words += [f"{step['added']:,} copies added"] if step["added"] else []
        words += [step["note"]] if step["note"] else []
        if words:
            notes.append(f"{step['name']}: {', '.join(words)}")
    return CloudCard(
        name=name,
        rows_in=rows_in,
        rows_out=steps[-1]["rows_out"],
        added=sum(step["added"] for step in steps),
        parts=tuple(
            Part(what, rows, 100 * rows / max(rows_in, 1), tone) for what, rows, tone in counts
        ),
        notes=tuple(notes),
    )
