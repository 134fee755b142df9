"""Real jobs in two processes: the bytes of one process, and every way in which one of them ends."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

# Defined in conftest.py, from which nothing can be imported.
Jobs = Any


pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]


def child(launcher: subprocess.Popen[str], process: int) -> int:
    """The process id of a launched process."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid and f"JAX_PROCESS_ID={process}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process {process}")


def wait_for_round(launcher: subprocess.Popen[str], number: int) -> None:
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line.startswith(f"round {number} "):
            return
    raise AssertionError(launcher.communicate())


def test_two_processes_give_the_bytes_of_one(
    jobs: Jobs, never_killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    jobs.command("launch", "--processes", "2", "run", jobs.run_file, "--out", out)
    assert jobs.state(out) == jobs.state(never_killed)
    assert jobs.rounds(out) == jobs.rounds(never_killed)
    assert (out / "report.html").exists()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_death_is_told_and_the_run_resumes_on_fewer(
    jobs: Jobs, never_killed: Path, tmp_path: Path, dies: int
) -> None:
    out = tmp_path / "out"
    with jobs.start("launch", "--processes", "2", "run", jobs.run_file, "--out", out) as launcher:
        wait_for_round(launcher, 1)
        pids = [child(launcher, process) for process in range(2)]
        os.kill(pids[dies], signal.SIGKILL)
        killed = time.monotonic()
        _, error = launcher.communicate()
    # Half a second for others to end by themselves, and what an orderly end takes.
    assert time.monotonic() - killed < 10
    assert launcher.returncode == 4
    (line,) = error.splitlines()
    assert line.startswith(f"fedjax-llm: process {dies} of 2 was ended by SIGKILL")
    assert line.endswith(f"with: fedjax-llm launch --processes 1 resume {out}")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    jobs.command("launch", "--processes", "1", "resume", out)
    assert jobs.state(out) == jobs.state(never_killed)
    assert jobs.rounds(out) == jobs.rounds(never_killed)


def test_ctrl_c_ends_all(jobs: Jobs, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with jobs.start("launch", "--processes", "2", "run", jobs.run_file, "--out", out) as launcher:
        wait_for_round(launcher, 1)
        pids = [child(launcher, process) for process in range(2)]
        launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    (line,) = error.splitlines()
    assert line.startswith("fedjax-llm: interrupted after round ")
    assert line.endswith(f"resume with: fedjax-llm launch --processes 2 resume {out}")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    # On as many, and then once more where there is nothing left to do.
    for _ in range(2):
        jobs.command("launch", "--processes", "2", "resume", out)
    assert jobs.state(out) == jobs.state(never_killed)
