"""A sweep as a table: the values of each cell and what it measured, in words."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fedjax_llm.runs.sweep.figures import Figures
from fedjax_llm.runs.sweep.running import Outcome
from fedjax_llm.runs.text import bytes_text, loss_text, seconds_text

_HEADS = (
    "round", "first round", "whole command", "tokens/s", "peak memory", "uplink a round", "loss",
)  # fmt: skip


def rows(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Heads and a row for each cell, as text."""
    heads = [*outcomes[0].cell.values, *_HEADS]
    return heads, [
        [*map(str, outcome.cell.values.values()), *_words(outcome.figures)] for outcome in outcomes
    ]


def _words(found: Figures | None) -> list[str]:
    if found is None:
        return ["failed"] + [""] * (len(_HEADS) - 1)
    return [
        seconds_text(found.seconds_round),
        seconds_text(found.seconds_first_round),
        seconds_text(found.seconds_command),
        f"{found.tokens_per_second:,.0f}",
        bytes_text(found.peak_bytes),
        bytes_text(found.uplink_bytes),
        loss_text(found.loss_nats),
    ]


def table(outcomes: Sequence[Outcome]) -> Table:
    """The rows for a terminal."""
    heads, body = rows(outcomes)
    found = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        found.add_column(Text(head), justify="right")
    for words in body:
        found.add_row(*map(Text, words))
    return found
