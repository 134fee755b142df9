"""Shows a run's events: progress bars on a terminal, plain flushed lines anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from fedjax_llm.runs import events, text
from fedjax_llm.runs.folder.metrics import RoundRecord
from fedjax_llm.runs.folder.summary import Summary


def print_plainly(event: events.Event) -> None:
    """One line per event that a log's reader wants; no bars, nothing that moves."""
    match event:
        case events.Stage(name, detail):
            print(f"{name}: {detail}" if detail else name, flush=True)
        case events.Note(words):
            print(words, flush=True)
        case events.RoundFinished(record):
            print(round_line(record), flush=True)
        case _:
            pass


class TerminalView:
    """Bars for the rounds and for what is being done now; finished rounds scroll up as lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._rounds = self._bars.add_task("rounds", total=None, visible=False)
        self._step = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> "TerminalView":
        """Starts the bars."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the bars."""
        self._bars.stop()

    def on_event(self, event: events.Event) -> None:
        """Shows one event."""
        match event:
            case events.Stage(name, detail):
                self._hide_step()
                line = Text(name, style="bold")
                if detail:
                    line.append(f"  {detail}", style="not bold")
                self._print(line)
            case events.Note(words):
                self._print(Text(words))
            case events.RoundStarted(round, rounds):
                self._bars.update(
                    self._rounds, total=rounds, completed=max(round - 1, 0), visible=True
                )
            case events.Progress(done, total, what):
                self._bars.update(
                    self._step, description=what, completed=done, total=total, visible=True
                )
            case events.RoundFinished(record):
                self._bars.update(self._rounds, completed=record["round"])
                self._hide_step()
                self._print(Text(round_line(record)))

    def _hide_step(self) -> None:
        self._bars.reset(self._step, visible=False)

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


@contextmanager
def watcher() -> Iterator[events.OnEvent]:
    """An `on_event` that suits standard output."""
    console = Console()
    if console.is_terminal:
        with TerminalView(console) as view:
            yield view.on_event
    else:
        yield print_plainly


def round_line(record: RoundRecord) -> str:
    """A round in one line.

    >>> round_line({"round": 1, "epsilon": 2.5, "clouds": {"a": {"loss_eval_nats": 1.5}}})
    'round 1  loss a 1.5000  epsilon 2.5'
    """
    losses = [
        f"{name} {text.loss_text(loss)}"
        for name, cloud in record.get("clouds", {}).items()
        if (loss := cloud.get("loss_eval_nats")) is not None
    ]
    parts = [f"round {record['round']}"]
    if losses:
        parts.append("loss " + ", ".join(losses))
    if record.get("epsilon") is not None:
        parts.append(f"epsilon {text.epsilon_text(record['epsilon'])}")
    if record.get("uplink_bytes"):
        parts.append(f"{text.bytes_text(record['uplink_bytes'])} sent")
    if record.get("seconds_round"):
        parts.append(text.seconds_text(record["seconds_round"]))
    return "  ".join(parts)


def _virtual_lines(summary: Summary) -> list[str]:
    """Time, money and goodput as the clouds would have had them."""
    found = summary.virtual
    if found is None:
        return []
    payers = found.payers.values()
    rent, egress = (sum(getattr(own, key) for own in payers) for key in ("rent", "egress"))
    money = ", ".join(
        f"{name} {text.dollars_text(dollars)}"
        for name, dollars in (("rent", rent), ("egress", egress))
    )
    if found.lost:
        money += f"; {text.dollars_text(found.lost)} of it lost"
    return [
        f"virtual  {text.seconds_text(summary.seconds_virtual)} on the clouds' machines and links",
        f"money    {text.dollars_text(found.dollars)}: {money}",
        f"goodput  {text.share_text(found.goodput)} of the clouds' time is training that counts, "
        f"{text.share_text(found.goodput_up)} of the time they were up",
    ]


def print_summary(summary: Summary, path: Path) -> None:
    """What a finished run came to, one answer before and after, and where the report is."""
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("cloud", "loss before", "after", "sent"):
        table.add_column(column, justify="left" if column == "cloud" else "right")
    for name, cloud in summary.clouds.items():
        table.add_row(
            Text(name),
            text.loss_text(cloud.loss_before_nats),
            text.loss_text(cloud.loss_after_nats),
            text.bytes_text(cloud.uplink_bytes),
        )
    console.print()
    console.print(table)
    lines = [f"epsilon  {text.epsilon_text(summary.epsilon, summary.epsilon_reason)}"]
    if summary.epsilon is not None and summary.delta is not None:
        lines[0] += f" at delta {text.delta_text(summary.delta)}"
    spent = [
        f"{stage} {text.seconds_text(seconds)}"
        for stage, seconds in summary.seconds.items()
        if seconds > 0
    ]
    lines.append(f"time     {text.seconds_text(summary.seconds_total)}: {', '.join(spent)}")
    lines += _virtual_lines(summary)
    if summary.secure_share:
        share = text.share_text(summary.secure_share)
        lines.append(f"sum      encryption, addition and decryption are {share} of the rounds")
    if summary.encrypted_fraction is not None and 0 < summary.encrypted_fraction < 1:
        share = text.share_text(summary.encrypted_fraction)
        lines.append(f"         {share} of the parameters are encrypted, the rest is in the clear")
    if summary.sample is not None:
        sample = summary.sample
        lines += ["", f"asked    {sample.prompt}", f"before   {' '.join(sample.before.split())}"]
        lines += [f"after    {' '.join(sample.after.split())}"]
    lines += ["", f"report   {path / 'report.html'}"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
