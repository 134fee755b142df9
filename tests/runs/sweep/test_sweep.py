"""Sweeps: the grid, cells that are bad, slow or cut off, going on, and what is drawn."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedjax_llm import cli
from fedjax_llm.errors import UserError
from fedjax_llm.runs import sweep as sweeps
from fedjax_llm.runs.folder import summary
from fedjax_llm.runs.sweep import drawing, figures, grid, page, process, running, watching
from fedjax_llm.runs.sweep.figures import Figures

RUN_FILE = """\
name = "cell"
rounds = 3

[model]
path = "model"

[adapter]
rank = 2

[[clouds]]
name = "site"
data = { sources = ["builtin:general"], limit = 40 }
"""
SWEEP = """\
name = "ranks"
run = "cell.toml"
set = ["seed=7"]

[[axis]]
name = "rank"
values = [2, 4]
keys = ["adapter.rank"]

[[axis]]
name = "devices"
values = [1, 2]

[plot]
x = "devices"
scaling = "strong"
"""
# Stands for `fedjax-llm run`: writes what a run of as many tokens a second as its rank would.
CHILD = """\
    import json, os, pathlib, sys
    settings = dict(setting.split("=", 1) for setting in sys.argv[3:])
    folder = pathlib.Path(sys.argv[2])
    rank, devices = int(settings["adapter.rank"]), int(os.environ["JAX_NUM_CPU_DEVICES"])
    with open("calls", "a") as calls:
        print(rank, devices, file=calls)
    folder.mkdir()
    if rank == 3:
        sys.exit("fedjax-llm: rank 3 is odd; use another")
    if rank == 5:
        (folder / "begun").touch()
        import time; time.sleep(60)
    records = [{"round": 0, "loss_eval_nats": 3.0, "seconds_round": 9.0}]
    for number in (1, 2, 3):
        spent = 5.0 if number == 1 else 1.0 / devices
        records.append({
            "round": number, "tokens": 100 * rank, "uplink_bytes": 8, "seconds_evaluate": 4.0,
            "seconds_checkpoint": 0.5, "seconds_round": spent + 4.5, "loss_eval_nats": 2.0,
        })
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in records))
    result = json.loads(pathlib.Path("summary.json").read_text())
    result["machine"]["devices"] = str(devices)
    (folder / "summary.json").write_text(json.dumps(result))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file whose cells are the stand-in; `calls` has a line for each that was started."""
    (tmp_path / "model").mkdir()
    (tmp_path / "cell.toml").write_text(RUN_FILE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD))
    result = summary.summarise(
        [{"round": 0}, {"round": 1}],
        name="cell",
        seed=0,
        privacy_statement="",
        secure_statement="",
        versions={"jax": "0"},
        machine={"cores": 2},
    )
    (tmp_path / "summary.json").write_text(result.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        process,
        "command",
        lambda run_file, overrides, out, processes: [
            sys.executable, str(tmp_path / "child.py"), str(run_file), str(out), *overrides
        ],
    )  # fmt: skip
    return tmp_path


def loaded(folder: Path, **changes: str) -> sweeps.SweepFile:
    text = SWEEP
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "sweep.toml").write_text(text)
    return sweeps.load(folder / "sweep.toml")


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().split("\n")[:-1] if path.exists() else []


class TestFile:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("values = [2, 4]", "values = []", r"sweep.toml:7: .*values"),
            ("values = [2, 4]", "values = [2, 2]", "must differ from each other"),
            ("values = [1, 2]", "values = [0, 2]", "must be numbers of devices, each at least 1"),
            ("values = [1, 2]", "values = [true, 2]", "must be numbers of devices"),
            ('x = "devices"', 'x = "device"', "must be the name of an axis, rank, devices"),
            ('name = "devices"', 'name = "rank"', "must be unique among the axes"),
            ('run = "cell.toml"', 'run = "no.toml"', "there is no .*no.toml; give the path"),
            ('run = "cell.toml"', "", "the key run is missing"),
            ('scaling = "strong"', 'scaling = "stong"', 'did you mean "strong"'),
            (
                'keys = ["adapter.rank"]',
                'also = { "training.microbatch" = [1] }',
                "as many values as the axis has, 2, and has 1",
            ),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, folder: Path, old: str, new: str, message: str):
        with pytest.raises(UserError, match=message) as found:
            loaded(folder, **{old: new})
        assert "\n" not in str(found.value)

    def test_every_combination_is_a_cell_and_what_grows_along_comes_with_it(self, folder: Path):
        also = 'keys = ["adapter.rank"]\nalso = { "training.learning_rate" = [0.1, 0.2] }'
        found = grid.cells(loaded(folder, **{'keys = ["adapter.rank"]': also}), ["rounds=2"])
        assert [cell.values for cell in found] == [
            {"rank": rank, "devices": devices} for rank in (2, 4) for devices in (1, 2)
        ]
        rate = {2: 0.1, 4: 0.2}
        for cell in found:
            rank = cell.values["rank"]
            assert cell.devices == cell.values["devices"] and cell.processes == 1
            assert cell.overrides == (
                "seed=7",
                "rounds=2",
                f"adapter.rank={rank}",
                f"training.learning_rate={rate[rank]}",
            )


class TestRunning:
    def test_each_cell_is_measured_once(self, folder: Path):
        sweep, out = loaded(folder), folder / "out"
        first = sweeps.run(sweep, out)
        assert calls(folder) == ["2 1", "2 2", "4 1", "4 2"]
        for outcome in first:
            rank, devices = outcome.cell.values.values()
            own = outcome.figures
            assert own is not None and outcome.machine["devices"] == str(devices)
            assert own.seconds_first_round == pytest.approx(5.0)
            assert own.seconds_round == pytest.approx(1 / devices)
            assert own.tokens_per_second == pytest.approx(100 * rank * devices)
            assert own.peak_bytes > 2**20 and own.seconds_command > 0 and own.loss_nats == 2.0
        assert json.loads((out / running.RESULTS).read_text()) == running.rows(first)
        again = sweeps.run(sweep, out)
        assert len(calls(folder)) == 4 and all(outcome.before for outcome in again)
        assert running.rows(again) == running.rows(first)
        # One more value is one more column of cells; a changed run file is another measurement.
        sweeps.run(loaded(folder, **{"values = [2, 4]": "values = [2, 4, 6]"}), out)
        assert calls(folder)[4:] == ["6 1", "6 2"]
        sweeps.run(sweep, out, ["rounds=4"])
        assert len(calls(folder)) == 10

    def test_bad_cells_are_reported_and_the_others_go_on(self, folder: Path):
        sweep = loaded(folder, **{"values = [2, 4]": "values = [0, 3, 2]"})
        outcomes = sweeps.run(sweep, folder / "out")
        refused, failed, good = outcomes[0], outcomes[2], outcomes[4]
        assert "rank must be" in refused.error and "got 0" in refused.error
        assert failed.error.startswith("rank 3 is odd; use another (exit code 1; ")
        assert good.figures is not None and not good.error
        assert calls(folder) == ["3 1", "3 2", "2 1", "2 2"]
        # What failed is tried again, what is done is not.
        sweeps.run(sweep, folder / "out")
        assert calls(folder)[4:] == ["3 1", "3 2"]
        assert not list((folder / "out" / "cells").glob("*.run"))

    def test_a_cell_that_takes_too_long_is_ended(self, folder: Path):
        sweep = loaded(
            folder,
            **{
                "values = [2, 4]": "values = [5]",
                "values = [1, 2]": "values = [1]",
                'run = "cell.toml"': 'run = "cell.toml"\nminutes = 0.05',
            },
        )
        started = time.monotonic()
        (outcome,) = sweeps.run(sweep, folder / "out")
        assert outcome.error == "took more than 0.05 minutes; raise minutes"
        assert time.monotonic() - started < 30

    def test_a_damaged_cell_is_measured_again(self, folder: Path):
        sweep = loaded(folder, **{"values = [2, 4]": "values = [2]"})
        sweeps.run(sweep, folder / "out")
        done = sorted((folder / "out" / "cells").glob("*.json"))
        done[0].write_text(done[0].read_text()[:40])
        sweeps.run(sweep, folder / "out")
        assert len(calls(folder)) == 3

    def test_two_sweeps_do_not_share_a_folder(self, folder: Path):
        with running._locked(folder / "out"), pytest.raises(UserError, match="another sweep"):
            sweeps.run(loaded(folder), folder / "out")

    def test_killed_at_work_it_goes_on_and_leaves_no_process(self, folder: Path):
        """The parent is interrupted while its second cell runs."""
        loaded(folder, **{"values = [2, 4]": "values = [2, 5]", "values = [1, 2]": "values = [1]"})
        script = f"""
            from pathlib import Path
            from fedjax_llm.runs import sweep as sweeps
            from fedjax_llm.runs.sweep import process
            process.command = lambda file, overrides, out, n: [
                {sys.executable!r}, "child.py", str(file), str(out), *overrides]
            sweeps.run(sweeps.load(Path("sweep.toml")), Path("out"))
        """
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not list(folder.glob("out/cells/*.run/begun")):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.send_signal(signal.SIGINT)
        parent.wait(20)
        assert children
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(int(child), 0)
        sweep = loaded(
            folder, **{"values = [2, 4]": "values = [2, 6]", "values = [1, 2]": "values = [1]"}
        )
        first, _ = sweeps.run(sweep, folder / "out")
        assert first.before and calls(folder) == ["2 1", "5 1", "6 1"]


def test_fake_devices_replace_those_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    found = process.environment(4)
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_b=2" and found["JAX_NUM_CPU_DEVICES"] == "4"
    assert process.environment(None) is os.environ


def test_processes_are_launched(tmp_path: Path):
    words = process.command(Path("a.toml"), ["rounds=2"], tmp_path, 3)
    at = words.index("launch")
    assert words[at + 1 : at + 4] == ["--processes", "3", "run"]
    assert "launch" not in process.command(Path("a.toml"), [], tmp_path, 1)


def measured(seconds: float, tokens: float = 1000.0, **changes: Any) -> Figures:
    return Figures(
        **{
            "rounds": 3, "seconds_command": 9.0, "seconds_first_round": 5.0,
            "seconds_round": seconds, "tokens_round": tokens,
            "tokens_per_second": tokens / seconds, "peak_bytes": 10, "uplink_bytes": 8.0,
            "loss_nats": None,
        }
        | changes
    )  # fmt: skip


def test_scaling_compares_with_the_first_place():
    strong = figures.speedups([1, 2, 4], [measured(8), measured(4), measured(4)], "strong")
    assert strong == [(1, 1, 1), (2, 2, 1), (4, 2, 0.5)]
    weak = figures.speedups([2, 8], [measured(5), measured(10, 4000.0)], "weak")
    assert weak == [(2, 1, 1), (8, 2, 0.5)]
    with pytest.raises(UserError, match="1000 and 2000 tokens"):
        figures.speedups([1, 2], [measured(8), measured(4, 2000.0)], "strong")


def test_the_page_holds_every_cell_and_the_drawing(folder: Path):
    sweep = loaded(folder, **{"values = [2, 4]": 'values = [2, "<b>"]'})
    outcomes = sweeps.run(sweep, folder / "out")
    text = page.write(sweep, outcomes, folder / "out").read_text()
    assert text.count("<tr>") == 5 and text.count("<svg") == 1
    assert "<b>" not in text and "&lt;b&gt;" in text and "2 failed" in text
    assert (folder / "out" / page.PLOT).read_text().endswith("</svg>\n")
    drawn = drawing.lines(outcomes, "devices")
    assert list(drawn) == ["rank 2"] and [x for x, _ in drawn["rank 2"]] == [1.0, 2.0]
    other = loaded(folder, **{'scaling = "strong"': ""})
    assert drawing.draw(other.plot, outcomes) != drawing.draw(sweep.plot, outcomes)


def test_cells_are_told_as_they_end(folder: Path):
    said = io.StringIO()
    console = Console(file=said, width=200)
    sweep = loaded(folder, **{"values = [2, 4]": "values = [2, 3]"})
    watching.watch(sweep, folder / "out", [], console)
    assert re.search(r"rank 2, devices 1: [\d.]+ m?s a round, 200 tokens/s", said.getvalue())
    assert "rank 3, devices 2: rank 3 is odd" in said.getvalue()


def test_the_command_prints_the_table_and_fails_with_the_first_bad_cell(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    loaded(folder, **{"values = [2, 4]": "values = [2, 3]"})
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "sweep.toml", "--out", "out"])
    out, err = capsys.readouterr()
    assert ended.value.code == UserError.exit_code
    assert "tokens/s" in out and "summary.html" in out
    assert "2 of 4 cells failed, the first because: rank 3 is odd" in err


@pytest.mark.drill
def test_real_runs_on_one_and_two_devices_end_with_the_same_loss(tmp_path: Path, stories260k: Path):
    (tmp_path / "cell.toml").write_text(RUN_FILE.replace('"model"', json.dumps(str(stories260k))))
    text = SWEEP.replace("values = [2, 4]", "values = [2]")
    settings = ["training.template=plain", "training.sequence_length=96", "training.batch_size=2"]
    (tmp_path / "sweep.toml").write_text(text.replace('"seed=7"', json.dumps(settings)[1:-1]))
    outcomes = sweeps.run(sweeps.load(tmp_path / "sweep.toml"), tmp_path / "out")
    assert [outcome.error for outcome in outcomes] == ["", ""]
    one, two = (outcome.figures for outcome in outcomes)
    assert one is not None and two is not None and one.loss_nats == two.loss_nats
    assert [outcome.machine["devices"][0] for outcome in outcomes] == ["1", "2"]
