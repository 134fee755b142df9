"""The command line as a process: exit codes, one line per error, and a start that is quick."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs.folder import RunFolder

GOOD = """\
name = "x"
rounds = 1
model.name = "smollm2-135m"
[[clouds]]
name = "a"
data.sources = ["builtin:medical"]
[[clouds]]
name = "b"
data.sources = ["builtin:finance"]
"""


def fedjax_llm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedjax_llm", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "nope.toml"], "cannot read the run file nope.toml: No such file or directory"),
        (["run"], "Missing argument 'FILE'. (see `fedjax-llm run --help`)"),
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? (see `fedjax-llm --help`)"),
        (["run", "--zzzz"], "No such option: --zzzz (see `fedjax-llm run --help`)"),
        (["resume", "nope"], "there is no run folder nope"),
        (["report", "nope"], "there is no run folder nope"),
        (["compare", "nope"], "there is no run folder nope"),
        (["export", "nope"], "say what to export: --peft OUT, --merged OUT, or both"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], line: str) -> None:
    done = fedjax_llm(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"fedjax-llm: {line}\n")


def test_a_refusal_is_one_line_and_code_3(tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text(GOOD)
    out = tmp_path / "out"
    settings = ["--set", "secure.sum=threshold", "--set", "secure.threshold=1"]
    done = fedjax_llm("run", tmp_path / "q.toml", *settings, "--out", out)
    assert done.returncode == Refused.exit_code == 3
    assert done.stderr.startswith(
        "fedjax-llm: --set secure.threshold=1: [secure] threshold must be"
    )
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text(GOOD)
    with RunFolder.create(tmp_path / "out", "") as folder:
        (folder.checkpoints / "0").mkdir(parents=True)
    done = fedjax_llm("run", tmp_path / "q.toml", "--out", tmp_path / "out")
    assert done.returncode == UserError.exit_code == 2
    assert "fedjax-llm resume" in done.stderr and done.stderr.count("\n") == 1


def test_help_needs_nothing_heavy() -> None:
    code = """
        import sys
        sys.argv = ["fedjax-llm", "--help"]
        import fedjax_llm.cli
        try:
            fedjax_llm.cli.main()
        except SystemExit as exit:
            assert not exit.code
        heavy = {"jax", "numpy", "pydantic", "matplotlib", "orbax", "openfhe", "rich.progress"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for command in ("run", "resume", "report", "compare", "epsilon", "export", "doctor", "models"):
        assert f"\n  {command} " in done.stdout


FAKE_JOB = """
    import os, signal, sys, time, types
    from pathlib import Path
    from fedjax_llm.runs import events
    import fedjax_llm.runs

    def run(run_file, folder, *, on_event):
        on_event(events.Stage("training"))
        (folder.checkpoints / "3").mkdir(parents=True)
        if MODE == "defect":
            raise ZeroDivisionError("a defect")
        time.sleep(60)

    job = types.ModuleType("fedjax_llm.runs.job")
    job.run = run
    sys.modules["fedjax_llm.runs.job"] = fedjax_llm.runs.job = job
    from fedjax_llm.cli import main
    main(["run", sys.argv[1], "--out", sys.argv[2]])
"""


def started(tmp_path: Path, mode: str) -> subprocess.Popen[str]:
    (tmp_path / "q.toml").write_text(GOOD)
    code = f"MODE = {mode!r}\n" + textwrap.dedent(FAKE_JOB)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "q.toml"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, "wait") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "training\n"  # flushed, although no terminal
        while not (tmp_path / "out" / "checkpoints" / "3").exists():
            pass
        process.send_signal(number)
        error = process.stderr.read()
    assert process.returncode == 130
    assert error == (
        "fedjax-llm: interrupted after round 3; "
        f"resume with: fedjax-llm resume {tmp_path / 'out'}\n"
    )


def test_a_defect_shows_its_traceback_and_code_1(tmp_path: Path) -> None:
    with started(tmp_path, "defect") as process:
        _, error = process.communicate()
    assert process.returncode == 1
    assert "Traceback" in error and "ZeroDivisionError" in error
