"""What a user sees while a run goes on, on a terminal and in a log."""

import pytest

from fedjax_llm.runs import events
from fedjax_llm.runs.report import progress


def test_both_views_take_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    record = {"round": 1, "epsilon": 2.0, "clouds": {"[a]": {"loss_eval_nats": 1.25}}}
    happening = [
        events.Stage("model", "small [x]"),
        events.Note("any 2 of 3 [clouds] can decrypt"),
        events.RoundStarted(1, 2),
        events.Progress(1, 4, "train"),
        events.Progress(4, 4, "train"),
        events.RoundFinished(record),  # type: ignore[arg-type]
    ]
    for event in happening:
        progress.print_plainly(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "model: small [x]",
        "any 2 of 3 [clouds] can decrypt",
        "round 1  loss [a] 1.2500  epsilon 2",
    ]
    console = Console(force_terminal=True, width=100, record=True)
    with progress.TerminalView(console) as view:
        for event in happening:
            view.on_event(event)
    shown = console.export_text()
    assert "any 2 of 3 [clouds] can decrypt" in shown and "loss [a] 1.2500" in shown
