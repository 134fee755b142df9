"""What a run spends: its budget, forecasts of epsilon, and rounds that count once they are run."""

import re
from pathlib import Path
from typing import Any

import pytest

from .test_privacy_jobs import plan_of, run, words

Jobs = Any


def test_a_run_stops_before_it_would_exceed_its_budget(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
    two = plan_of(jobs, *settings).epsilon(2)
    assert two is not None
    out = tmp_path / "out"
    records = run(jobs, out, *settings, f"privacy.budget={two + 0.01}")
    assert [record["round"] for record in records] == [0, 1, 2]
    assert records[-1]["epsilon"] <= two + 0.01
    assert "enough for 2 of 3 rounds" in capfd.readouterr().out
    assert (out / "report.html").exists()
    assert jobs.here("resume", out) == 0  # nothing left that it may do
    toml = out / "run.toml"
    one = plan_of(jobs, *settings).epsilon(1)
    toml.write_text(re.sub(r"budget = [0-9.]+", f"budget = {one + 0.01}", toml.read_text()))
    capfd.readouterr()
    assert jobs.here("resume", out) == 3
    assert "has spent more than its budget" in capfd.readouterr().err


def test_epsilon_tells_noise_rounds_and_a_table(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = words("privacy.noise_multiplier=1.0", "privacy.client_rate=0.5", "rounds=8")
    command = ("epsilon", jobs.run_file, *settings, "--target", "2", "--budget", "5")
    assert jobs.here(*command) == 0
    said = capfd.readouterr().out
    plan = plan_of(jobs, "privacy.noise_multiplier=1.0", "privacy.client_rate=0.5", "rounds=8")
    assert f"noise_multiplier = {plan.noise_for(2.0).noise_multiplier:.4g} for epsilon" in said
    assert f"{plan.rounds_within(5.0)} of 8 rounds within epsilon 5" in said
    table = [
        line.split() for line in said.splitlines() if re.match(r"[\d.]+ +[\d.]+ +[\d.]+", line)
    ]
    assert len(table) == 9  # half, same and twice the noise and the rate
    same = [row for row in table if row[:2] == ["1", "0.5"]]
    assert [float(cell) for cell in same[0][2:]] == [
        pytest.approx(plan.epsilon(4), abs=1e-4),
        pytest.approx(plan.epsilon(8), abs=1e-4),
        pytest.approx(plan.epsilon(16), abs=1e-4),
    ]


def test_offline_rounds_that_were_run_cannot_be_changed_afterwards(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each cloud's epsilon counts them; those to come may change."""
    out = tmp_path / "out"
    run(jobs, out, "rounds=2", "clouds.general.offline_rounds=[2]", "secure.sum=plain")
    toml = out / "run.toml"
    text = toml.read_text().replace("rounds = 2", "rounds = 3", 1)
    toml.write_text(re.sub(r"offline_rounds = \[\s*2,?\s*\]", "offline_rounds = [1, 2]", text))
    capfd.readouterr()
    assert jobs.here("resume", out) == 2
    assert "say something else about the 2 rounds" in capfd.readouterr().err
    toml.write_text(re.sub(r"offline_rounds = \[\s*2,?\s*\]", "offline_rounds = [2, 3]", text))
    assert jobs.here("resume", out) == 0
