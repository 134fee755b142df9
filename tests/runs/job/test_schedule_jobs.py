"""[schedule] and [compression] from a run file to a run's folder, through an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedjax_llm.errors import FedJaxError
from fedjax_llm.runs import runfile

Jobs = Any
# Unequal clouds, so that they do not come round together.
CLOUDS = (
    "clouds.medical.compute={tokens_per_second=9000.0}",
    "clouds.finance.compute={tokens_per_second=5000.0}",
    "clouds.general.compute={tokens_per_second=1500.0}",
    "clouds.medical.prices={dollars_per_hour=36.0}",
)
FAILURES = (
    "clouds.finance.availability={mtbf_s=2.0, mttr_s=0.5}",
    "clouds.medical.availability={mtbf_s=9.0, mttr_s=0.5}",
)
SCHEDULES = {
    "deadline": '{name="deadline", seconds=0.4, quorum=2, grace_seconds=9.0}',
    "buffered": '{name="buffered", size=2, staleness_exponent=1.0}',
    "streaming": '{name="streaming", fragments=2, overlap=true, mixing=0.5}',
    "decoupled": '{name="decoupled", quorum=2, fragments=3, mixing=0.25, grace_seconds=0.1}',
}
# Their messages go the same way through a run.
LATER = ("buffered", "decoupled")
FEW_BITS = (
    "secure.bits=12",
    'compression={codec="rotation", rounding="stochastic"}',
)


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", ["deadline", "streaming", *(pytest.param(n, marks=pytest.mark.drill) for n in LATER)]
)
def test_a_run_under_a_schedule_is_recorded(jobs: Jobs, tmp_path: Path, name: str) -> None:
    settings = (*CLOUDS, *FAILURES, f"schedule={SCHEDULES[name]}", "privacy.unit=none",
                "privacy.noise_multiplier=0.0", "aggregation.server_optimizer=diloco",
                "aggregation.server_learning_rate=0.5", "rounds=4")  # fmt: skip
    out = tmp_path / "out"
    assert jobs.here("run", jobs.run_file, *words(*settings), "--out", out) == 0
    records = lines(out)
    assert len(records) == 5
    for record in records[1:]:
        landed = [cloud for cloud in record["clouds"].values() if cloud["lands"]]
        assert len(landed) >= 2
        assert all(cloud["uplink_bytes"] > 0 for cloud in landed)
        assert record["seconds_virtual"] > 0
        assert record["dollars"] == pytest.approx(
            sum(cloud["dollars"] for cloud in record["clouds"].values())
        )
    # A hundredth of a dollar a second, while the cloud is up.
    spent = sum(record["dollars"] for record in records[1:])
    seconds = sum(record["seconds_virtual"] for record in records[1:])
    assert 0 < spent <= seconds / 100 * 1.000001


def test_an_interrupted_run_goes_on_with_what_was_under_way(jobs: Jobs, tmp_path: Path) -> None:
    settings = (*CLOUDS, *FAILURES, f"schedule={SCHEDULES['decoupled']}", *FEW_BITS, "rounds=4",
                "privacy.sampling=full", "compression.error_feedback=true")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = ("run", jobs.run_file, *words(*settings), "--out")
    assert jobs.here(*run, whole) == 0
    stop = """
from fedjax_llm.federation import Federation
whole = Federation.run_round
def run_round(self, state, *rest, **more):
    if int(state.round) == 2:
        raise KeyboardInterrupt
    return whole(self, state, *rest, **more)
Federation.run_round = run_round
"""
    with jobs.start(*run, cut, code=stop) as process:
        process.communicate()
    assert process.returncode != 0
    assert len(lines(cut)) == 3
    assert jobs.here("resume", cut) == 0
    assert jobs.state(whole) == jobs.state(cut)
    assert any("pending" in name for name in jobs.state(whole))
    assert any("memory" in name for name in jobs.state(whole))
    assert jobs.here("export", whole, "--peft", tmp_path / "adapter") == 0


def test_links_and_rounds_of_such_a_run_are_its_own(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*CLOUDS, f"schedule={SCHEDULES['buffered']}", "privacy.unit=none",
                "privacy.noise_multiplier=0.0", "rounds=2")  # fmt: skip
    out = tmp_path / "out"
    assert jobs.here("run", jobs.run_file, *words(*settings), "--out", out) == 0
    toml = out / "run.toml"
    text = toml.read_text()
    assert "rounds = 2" in text
    toml.write_text(text.replace("rounds = 2", "rounds = 5"))
    assert jobs.here("resume", out) == 2
    error = capsys.readouterr().err.strip()
    assert "timeline of the clouds (links, machines, failures, rounds)" in error
    assert "\n" not in error


@pytest.mark.parametrize("unit", ["example", "client"])
def test_everything_at_once(jobs: Jobs, tmp_path: Path, unit: str) -> None:
    """Privacy, encryption, few bits and clouds that do not wait."""
    settings = (
        *CLOUDS,
        f"schedule={SCHEDULES['buffered']}",
        *FEW_BITS,
        f"privacy.unit={unit}",
        "privacy.noise_multiplier=1.0",
        "privacy.delta=1e-3",
        # The server adds the noise of unit client: it has no sum to send back without.
        "privacy.sampling=full" if unit == "client" else "compression.broadcast=sum",
    )
    out = tmp_path / "out"
    assert jobs.here("run", jobs.run_file, *words(*settings), "--out", out) == 0
    last = lines(out)[-1]
    assert last["epsilon"] > 0
    assert np.isfinite(last["loss_eval_nats"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (['schedule={name="deadline"}'], "needs seconds"),
        (['schedule={name="deadline", seconds=1.0, quorum=4}'], "must be at most 3"),
        (['schedule={name="synchronous", quorum=2}'], "goes with name = deadline or decoupled"),
        (['schedule={name="bufered", size=2}'], "buffered"),
        (['schedule={name="streaming", fragments=1, overlap=true}'], "set fragments to 2"),
        (['schedule={name="buffered", size=1}'], "no sum of fewer than 2"),
        (['compression={codec="rotation", one_in=4}'], "not with"),
        (
            ['schedule={name="decoupled", quorum=2}', "audit={canaries=8}", "privacy.unit=example"],
            "look at their data more often",
        ),
        (
            [
                'schedule={name="streaming", fragments=2}',
                "privacy.noise=skellam",
                "privacy.sampling=full",
            ],
            "integer noise is calibrated to messages that are sent whole",
        ),
        (['compression={rounding="stochastic"}'], "bits"),
        (['compression={codec="rotation", rotate=true}'], "goes after another codec"),
        (['compression={codec="sketch", one_in=1}'], "one_in"),
        (
            ["aggregation.rule=rolora", 'compression={codec="sketch"}'],
            "adds one message of the same shape",
        ),
        (['schedule={name="buffered", size=2}', "privacy.client_rate=0.5"], "no amplification"),
        (['schedule={name="streaming"}', "clouds.medical.offline_rounds=[1]"], "availability"),
    ],
)
def test_mistakes_are_one_line_when_the_file_is_read(
    jobs: Jobs, settings: list[str], expected: str
) -> None:
    with pytest.raises(FedJaxError, match=expected) as caught:
        runfile.load(jobs.run_file, settings)
    assert "\n" not in str(caught.value)
