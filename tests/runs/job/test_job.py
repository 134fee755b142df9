"""Whole jobs: what they leave behind, and that no way of ending one changes what it learns."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs import job
from fedjax_llm.runs.folder import summary
from fedjax_llm.runs.folder.checkpoints import Checkpoints

# Defined in conftest.py, from which nothing can be imported.
Jobs = Any


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
def test_a_run_leaves_a_whole_folder(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = (
        "rounds=1",
        "privacy.unit=example",
        "privacy.noise_multiplier=0.8",
        'evaluation.prompt="Once upon a time"',
        "evaluation.max_new_tokens=4",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert jobs.here("run", jobs.run_file, *overrides, "--out", out) == 0
    printed = capfd.readouterr().out

    assert {entry.name for entry in out.iterdir()} == {
        *("run.toml", "metrics.jsonl", "opened.json", "summary.json", "report.html"),
        "timeline.json",
        *("checkpoints", "tensorboard", "format", ".lock"),
    }
    assert Checkpoints(out / "checkpoints").rounds() == [0, 1]
    assert any((out / "tensorboard").glob("events.*"))

    before, after = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "summary.json").read_text())
    fell = [
        after["clouds"][name]["loss_eval_nats"] < before["clouds"][name]["loss_eval_nats"]
        for name in ("medical", "finance", "general")
    ]
    assert result["loss_fell_in_every_cloud"] is all(fell)
    for name, cloud in result["clouds"].items():
        assert cloud["loss_before_nats"] == before["clouds"][name]["loss_eval_nats"]
        assert cloud["loss_after_nats"] == after["clouds"][name]["loss_eval_nats"]
        assert cloud["uplink_bytes"] == after["clouds"][name]["uplink_bytes"] > 0
    assert 0 < result["epsilon"] == after["epsilon"]
    assert all(after[f"seconds_{stage}"] > 0 for stage in ("train", "encrypt", "add", "decrypt"))

    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\((?!#)|@import""", page)
    assert "any 2 of the 3 clouds (medical, finance, general) can together decrypt" in printed
    assert printed.rstrip().endswith(f"report   {out / 'report.html'}")


@pytest.mark.slow
def test_plain_and_threshold_end_in_the_same_bytes(
    jobs: Jobs, never_killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert jobs.here("run", jobs.run_file, "--set", "secure.sum=plain", "--out", out) == 0
    assert jobs.state(out) == jobs.state(never_killed)


def test_programs_from_the_cache_give_the_bytes_of_fresh_ones(
    jobs: Jobs, never_killed: Path, tmp_path: Path
) -> None:
    """The tests below rely on it: only the job that was never killed compiles."""
    before = jobs.compiled("jit_")
    assert jobs.here("run", jobs.run_file, "--out", tmp_path / "out") == 0
    assert jobs.compiled("jit__train") | jobs.compiled("jit__apply") <= before
    assert jobs.state(tmp_path / "out") == jobs.state(never_killed)
    assert jobs.rounds(tmp_path / "out") == jobs.rounds(never_killed)


# Each is put before the command line in a process, which then dies at that very point.
DIE = """
import os, signal
from pathlib import Path
from fedjax_llm.runs import report
from fedjax_llm.runs.folder import metrics
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""
DIE_BEFORE_THE_LINE = f"{DIE}\nmetrics.append = die"
DIE_WITHIN_THE_LINE = f"""{DIE}
whole = metrics.append
def append(path, record):
    if record["round"] == 0:
        return whole(path, record)  # the line that the process before did not come to write
    with path.open("ab") as file:
        file.write(b'{{"round": 1, "loss_eval')
    die()
metrics.append = append
"""
DIE_BEFORE_THE_REPORT = f"{DIE}\nreport.write = die"


@pytest.mark.slow
def test_a_run_killed_at_any_point_ends_in_the_same_bytes(
    jobs: Jobs, never_killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    checkpoints = Checkpoints(out / "checkpoints")

    def recorded() -> list[int]:
        return [record["round"] for record in jobs.rounds(out)]

    def killed(
        *arguments: str | Path, code: str = "", when: Callable[[], bool] | None = None
    ) -> None:
        with jobs.start(*arguments, code=code) as process:
            if when is not None:
                wait_until(when, process)
                process.kill()
            _, error = process.communicate()
        assert (process.returncode, error) == (-signal.SIGKILL, "")

    lines = out / "metrics.jsonl"
    killed("run", jobs.run_file, "--out", out, code=DIE_BEFORE_THE_LINE)
    assert (checkpoints.rounds(), recorded()) == ([0], [])

    killed("resume", out, code=DIE_WITHIN_THE_LINE)
    assert (checkpoints.rounds(), recorded()) == ([0, 1], [0])
    assert not lines.read_bytes().endswith(b"\n")

    def training() -> bool:
        if recorded()[-1] < 1:
            return False
        time.sleep(0.4)  # the program of round 2 is being loaded, or runs
        return True

    killed("resume", out, when=training)
    assert recorded()[:2] == [0, 1]

    killed("resume", out, code=DIE_BEFORE_THE_REPORT)
    assert (out / "summary.json").exists() and not (out / "report.html").exists()

    assert jobs.here("resume", out) == 0
    assert (out / "report.html").exists()
    assert jobs.state(out) == jobs.state(never_killed)
    assert jobs.rounds(out) == jobs.rounds(never_killed)
    timelines = [(own / "timeline.json").read_bytes() for own in (out, never_killed)]
    assert timelines[0] == timelines[1]


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(jobs: Jobs, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted(process: subprocess.Popen[str], number: signal.Signals) -> int:
        process.send_signal(number)
        _, error = process.communicate()
        assert process.returncode == 130
        found = re.fullmatch(
            r"fedjax-llm: interrupted after round (\d); "
            rf"resume with: fedjax-llm resume {re.escape(str(out))}\n",
            error,
        )
        assert found, error
        assert int(found[1]) == Checkpoints(out / "checkpoints").rounds()[-1]
        return int(found[1])

    with jobs.start("run", jobs.run_file, "--out", out) as process:
        wait_until((out / "checkpoints" / "0").exists, process)
        after_first = interrupted(process, signal.SIGINT)
    with jobs.start("resume", out) as process:
        wait_until(lambda: "continuing after" in process.stdout.readline(), process)
        assert interrupted(process, signal.SIGTERM) >= after_first
    assert jobs.here("resume", out) == 0
    assert jobs.state(out) == jobs.state(never_killed)
    assert jobs.rounds(out) == jobs.rounds(never_killed)


def test_a_full_disk_costs_no_round(
    jobs: Jobs,
    never_killed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from fedjax_llm.runs.folder import disk

    out, room = tmp_path / "out", disk.reserve

    def reserve(folder: Path, *sizes: int) -> None:
        if (folder / "1").exists():
            raise OSError(28, "No space left on device")
        room(folder, *sizes)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "reserve", reserve)
        assert jobs.here("run", jobs.run_file, "--out", out) == UserError.exit_code
    error = capfd.readouterr().err
    assert error.startswith("fedjax-llm: the disk is full: could not write ")
    assert error.count("\n") == 1 and "fedjax-llm resume" in error
    assert Checkpoints(out / "checkpoints").rounds() == [0, 1]
    assert jobs.here("resume", out) == 0
    assert jobs.state(out) == jobs.state(never_killed)
    assert jobs.rounds(out) == jobs.rounds(never_killed)


def test_resuming_a_finished_run_only_reports_again(
    jobs: Jobs, never_killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(never_killed, tmp_path / "out")
    written = (out / "summary.json").read_bytes()
    (out / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(job, "run", None)  # neither the model nor the key ceremony
        assert jobs.here("resume", out) == 0
    assert (out / "report.html").exists()
    assert (out / "summary.json").read_bytes() == written

    # A summary that a full disk or an editor damaged is made again.
    (out / "summary.json").write_bytes(written[:100])
    assert jobs.here("resume", out) == 0
    result, before = summary.read(out / "summary.json"), summary.read(never_killed / "summary.json")
    assert result is not None and before is not None
    assert (result.clouds, result.epsilon) == (before.clouds, before.epsilon)


def test_exports_compute_what_the_run_learned(
    jobs: Jobs, never_killed: Path, stories260k: Path, tmp_path: Path
) -> None:
    from fedjax_llm.lora import read_peft
    from fedjax_llm.models import apply, load_model

    peft, merged = tmp_path / "peft", tmp_path / "merged"
    assert jobs.here("export", never_killed, "--peft", peft, "--merged", merged) == 0
    base = load_model(stories260k)
    adapter = read_peft(peft, base.config)
    learned = [leaf for name, leaf in jobs.state(never_killed).items() if ".adapter" in name]
    found = [
        (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for leaf in jax.tree.leaves(adapter)
    ]
    assert sorted(found) == sorted(learned)
    assert adapter.scale == 2.0

    tokens_BxT = jnp.asarray(np.random.default_rng(0).integers(3, 512, (2, 24)), jnp.int32)
    other = load_model(merged)
    logits = apply(other.config, other.base, None, tokens_BxT)
    with_adapter = apply(base.config, base.base, adapter, tokens_BxT)
    without = apply(base.config, base.base, None, tokens_BxT)
    np.testing.assert_allclose(logits, with_adapter, atol=1e-4)
    assert float(jnp.max(jnp.abs(with_adapter - without))) > 1e-2

    # What lies at the place of an export is not overwritten.
    kept = (peft / "adapter_model.safetensors").read_bytes()
    assert jobs.here("export", never_killed, "--peft", peft) == UserError.exit_code
    assert (peft / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.slow
def test_a_run_that_encrypts_a_part_says_so_and_ends_in_the_same_bytes(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The map is measured on public text, again after an interruption; it moves no result."""
    settings = ("rounds=1", "privacy.unit=example", "privacy.noise_multiplier=0.8")
    selective = (
        "secure.selective={fraction=0.3, measure_on=['builtin:general'], measure_rows=6}",
        "secure.minimum_clients=3",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    more = [word for setting in selective for word in ("--set", setting)]
    plain, part = tmp_path / "plain", tmp_path / "part"
    assert jobs.here("run", jobs.run_file, *words, "--set", "secure.sum=plain", "--out", plain) == 0
    capfd.readouterr()
    assert jobs.here("run", jobs.run_file, *words, *more, "--out", part) == 0
    printed = capfd.readouterr().out
    assert jobs.state(plain) == jobs.state(part)

    statement = next(line for line in printed.splitlines() if "Selective: only 30 %" in line)
    assert "measured on 6 rows of builtin:general" in statement
    assert "In the clear, read by the server for every client: " in statement
    assert "3 or more clients" in statement
    assert "30 % of the parameters are encrypted, the rest is in the clear" in printed
    assert "encryption, addition and decryption are" in printed
    result = summary.read(part / "summary.json")
    assert result is not None
    assert result.secure_statement == statement
    assert result.encrypted_fraction == pytest.approx(0.3, abs=1e-3)
    assert result.secure_share is not None and 0 < result.secure_share < 1
    assert "30 % of them encrypted" in (part / "report.html").read_text()

    run_toml = (part / "run.toml").read_text()
    (part / "run.toml").write_text(run_toml.replace("rounds = 1", "rounds = 2", 1))
    (plain / "run.toml").write_text(
        (plain / "run.toml").read_text().replace("rounds = 1", "rounds = 2", 1)
    )
    assert jobs.here("resume", part) == 0
    assert jobs.here("resume", plain) == 0
    assert jobs.state(plain) == jobs.state(part)
    # Encrypting another part from now on would show parts of both.
    changed = run_toml.replace("fraction = 0.3", "fraction = 0.2").replace(
        "rounds = 1", "rounds = 3", 1
    )
    (part / "run.toml").write_text(changed)
    assert jobs.here("resume", part) == UserError.exit_code
    assert "the section [secure] at hand is not what" in capfd.readouterr().err
