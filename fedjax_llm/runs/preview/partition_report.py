"""The report of `fedjax-llm data partition`: who holds what, before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.data import Corpus, PartitionStatistics, partition_statistics, partition_svg
from fedjax_llm.errors import UserError
from fedjax_llm.models import DecoderConfig, Tokenizer
from fedjax_llm.models.model import load_config
from fedjax_llm.models.tokenizer import load_tokenizer
from fedjax_llm.runs import build
from fedjax_llm.runs.events import OnEvent
from fedjax_llm.runs.folder import disk
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.runs.text import share_text

# Labels named in a line of the table.
_NAMED = 3


@dataclass(frozen=True)
class _Outline:
    """What the data need of a model: no weights."""

    config: DecoderConfig
    tokenizer: Tokenizer


def corpora(run_file: RunFile, on_event: OnEvent) -> list[Corpus]:
    """Every cloud's data, exactly as a run would have them; no weight is read.

    Raises:
      UserError: Data or model are missing or damaged, or rows that cannot be divided so.
    """
    folder = build.model_folder(run_file, on_event)
    outline = _Outline(load_config(folder), load_tokenizer(folder))
    return build.corpora(run_file, outline, on_event)


def statistics(data: Sequence[Corpus]) -> PartitionStatistics:
    """Of the training records of all clients, named by cloud and by number where there are several.

    Tokens are those that are trained on, without padding.
    """
    names, records, tokens = [], [], []
    for corpus in data:
        count = len(corpus.client_rows)
        ends = list(accumulate(corpus.client_records))
        # Padding has segment 0.
        used_N = (np.asarray(corpus.train.segments_BxT) > 0).sum(axis=1)
        rows = np.split(used_N, list(accumulate(corpus.client_rows))[:-1])
        for client, end in enumerate(ends):
            names.append(corpus.name if count == 1 else f"{corpus.name} {client + 1}")
            records.append(corpus.train_records[end - corpus.client_records[client] : end])
            tokens.append(int(rows[client].sum()))
    return partition_statistics(names, records, tokens)


def show(console: Console, data: Sequence[Corpus], found: PartitionStatistics) -> None:
    """Prints the statistics as a table, with what the columns mean below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("client", overflow="fold")
    heads = ["rows", "of all", "tokens", "groups", "shared"]
    if found.has_labels:
        heads += ["labels", "JS bits", "TV"]
    for head in heads:
        table.add_column(head, justify="right")
    if found.has_labels:
        table.add_column("most of", overflow="fold")
    total = sum(client.rows for client in found.clients)
    for client in found.clients:
        cells = [
            client.name,
            f"{client.rows:,}",
            share_text(client.rows / total),
            "" if client.tokens is None else f"{client.tokens:,}",
            f"{client.groups:,}",
            f"{client.shared_groups:,}",
        ]
        if found.has_labels:
            cells += [
                f"{client.effective_labels:.2f}",
                f"{client.js_bits:.3f}",
                f"{client.total_variation:.3f}",
                ", ".join(
                    f"{' '.join(label.split()) or 'no label'} {share_text(count / client.rows)}"
                    for label, count in _commonest(client.labels)
                ),
            ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for line in ["", *lines(data, found)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def lines(data: Sequence[Corpus], found: PartitionStatistics) -> list[str]:
    """What is said below the table: how unlike the clients are, and what was held out."""
    unit = "tokens" if found.in_tokens else "rows"
    held_out = ", ".join(f"{corpus.name} {len(corpus.evaluation_records)}" for corpus in data)
    said = [
        f"sizes in {unit}: the largest {found.largest:.2f} times the mean, Gini {found.gini:.3f}",
        f"shared: {found.shared_groups} groups have rows at more than one client",
        f"held out for evaluation: {held_out}",
    ]
    if found.has_labels:
        said[:0] = [
            f"labels: {found.effective_labels:.2f} effective of {len(found.labels)} in the whole; "
            f"who holds a row tells {found.label_bits:.3f} bits about its label",
            "JS, TV: Jensen-Shannon divergence and total variation of a client's labels from the "
            "whole",
        ]
    return said


def check_plot(out: Path) -> None:
    """Raises UserError unless `out` is the name of an SVG file in a folder that exists."""
    if out.suffix.lower() != ".svg":
        raise UserError(f"--plot writes SVG, and {out} does not end in .svg; rename it")
    if not out.parent.is_dir():
        raise UserError(f"--plot {out}: there is no folder {out.parent}; make it")


def plot(found: PartitionStatistics, out: Path) -> None:
    """Writes the picture.

    Raises:
      UserError: The file cannot be written.
    """
    try:
        disk.atomic_write(out, partition_svg(found))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _commonest(labels: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
