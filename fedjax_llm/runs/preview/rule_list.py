"""The tables of `fedjax-llm rules`, made from what the rules say of themselves."""

from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.aggregation import RULES, SERVER_OPTIMIZERS, NormalisedMean
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import COMBINES
from fedjax_llm.runs.sections.aggregation import WeightKind


def rows() -> list[list[str]]:
    """A row for each rule: name, promises, what is sent, source, summary."""
    found = []
    for name, rule in RULES.items():
        facts = rule.facts
        found.append(
            [
                name,
                "yes" if facts.exact else ("personal" if rule.kept else "no"),
                "no" if rule.needs_individual_messages else "yes",
                "yes" if facts.dp_safe else "no",
                "yes" if facts.ranks else "no",
                str(rule.stages + rule.weighs_by_result),
                facts.uplink,
                facts.downlink,
                rule.summary,
                rule.source,
            ]
        )
    return found


def show(console: Console) -> None:
    """Prints the rules, the ways to combine messages, and the names of everything else."""
    heads = ["rule", "exact", "adds", "dp-safe", "ranks", "sums", "sends", "receives", "", "source"]
    _table(console, heads, rows())
    console.print(
        "exact: the new product is the mean of the clients' products. adds: works under encryption."
        "\ndp-safe: noise enters the product once a round. ranks: clients may have different ones."
        "\nsends, receives: numbers of a client per round, layer and projection of D x F, rank R."
        "\n",
        highlight=False,
    )
    combines = [["mean", "yes", "the weighted mean", ""]]
    combines.append(["normalised", "yes", NormalisedMean.summary, NormalisedMean.source])
    for name, build in COMBINES.items():
        combine = build(1, 1.0)
        combines.append([name, "in groups", combine.summary, combine.source])
    _table(console, ["combine", "adds", "", "source"], combines)
    console.print(
        f"\nserver_optimizer: {', '.join(SERVER_OPTIMIZERS)}"
        f"\nweights: {', '.join(get_args(WeightKind))}"
        f"\n[attack] name: {', '.join(ATTACKS)}, label-flip",
        highlight=False,
        markup=False,
    )


def _table(console: Console, heads: list[str], cells: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
