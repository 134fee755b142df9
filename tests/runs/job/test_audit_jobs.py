"""[audit] from a run file to a run's folder, and the audit of a folder."""

import json
from pathlib import Path
from typing import Any

import markupsafe
import pytest

from fedjax_llm.errors import UserError

from .test_privacy_jobs import loaded, plan_of, run

Jobs = Any


def test_a_run_is_audited_and_its_report_shows_both_bounds(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = (
        "rounds=1",
        "privacy.noise_multiplier=1.0",
        "secure.sum=plain",
        "audit={canaries=200}",
    )
    run(jobs, out, *settings)
    found = json.loads((out / "audit.json").read_text())
    assert found["report"]["consistent"] and found["report"]["unit"] == "client"
    assert 0.5 < found["report"]["lower_bound"] < found["report"]["upper_bound"]
    assert found["run_epsilon"] == pytest.approx(plan_of(jobs, *settings).epsilon(1))
    page = (out / "report.html").read_text()
    assert "Epsilon from both sides" in page
    assert str(markupsafe.escape(found["report"]["statement"][1:])) in page
    assert f"at least {found['report']['lower_bound']:.2f}" in page
    (out / "audit.json").write_text("{}")
    capfd.readouterr()
    assert jobs.here("report", out) == 2
    assert "audit.json is damaged" in capfd.readouterr().err


def test_audit_of_a_folder_with_an_inversion(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = (
        "rounds=1",
        "privacy.unit=example",
        "privacy.noise_multiplier=1.0",
        "secure.sum=plain",
    )
    run(jobs, out, *settings)
    assert "Epsilon from both sides" not in (out / "report.html").read_text()
    assert jobs.here("audit", out, "--canaries", "64", "--rows", "16", "--inversion") == 0
    found = json.loads((out / "audit.json").read_text())
    # The twin samples at the run's rate, so that the same epsilon is promised.
    assert found["report"]["upper_bound"] == pytest.approx(found["run_epsilon"], rel=0.2)
    assert [read["seen"] for read in found["inversion"]] == [
        "the gradient without protection",
        "clipped and noised as in the run",
    ]
    assert found["inversion"][1]["recall"] < 0.2
    assert "an attacker who holds" in (out / "report.html").read_text()


def test_what_no_audit_is_written_for_is_told_when_the_file_is_read(jobs: Jobs) -> None:
    for setting, match in (
        ("privacy.unit=none", 'unit "none" promises nothing'),
        ("privacy.noise=lambda-cgd", "is not independent Gaussian noise"),
        ("privacy.period=2", "a period of 2 gives turns"),
        ("privacy.adaptive={}", "the clip norm is adaptive"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            loaded(jobs, "audit={canaries=64}", setting)
        assert "\n" not in str(caught.value)
