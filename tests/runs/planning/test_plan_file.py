"""[plan] in a run file, and the forecast beside the run."""

from pathlib import Path

import pytest

from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.runs import runfile
from fedjax_llm.runs.folder import RunFolder, forecast_file

FORECAST = "plan.forecast={rounds=4, rounds_low=3, rounds_high=6, seconds=2, bytes=5, dollars=0}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.target_loss=3.0"], "either target_loss or target_tokens, both given"),
        (["plan.max_pilot_rounds=3"], "max_pilot_rounds must be at least pilot_rounds, 4"),
        (["plan.minimise=watts"], "minimise"),
        (["plan.max_seconds=0"], "max_seconds"),
        (["plan.bits=[3]"], "bits"),
        (["plan.schedules=['fast']"], "schedules"),
        (["plan.local_steps=[]"], "local_steps"),
        (["evaluation.target_loss=3.0"], "target_loss is not that of"),
        ([FORECAST, "plan.forecast.epsilon=1.0"], "epsilon"),
        ([FORECAST, "plan.forecast.rounds=0"], "rounds"),
    ],
)
def test_contradictions_are_one_line(overrides: list[str], words: str, plan_file: Path) -> None:
    with pytest.raises(FedJaxError, match=words) as error:
        runfile.load(plan_file, overrides)
    assert "\n" not in str(error.value)


def test_a_file_with_a_forecast_loads_back_equal(plan_file: Path, tmp_path: Path) -> None:
    run_file = runfile.load(plan_file, [FORECAST])
    (tmp_path / "out.toml").write_text(runfile.to_toml(run_file))
    assert runfile.load(tmp_path / "out.toml") == run_file


def test_the_forecast_stands_beside_the_run(plan_file: Path, tmp_path: Path) -> None:
    run_file = runfile.load(plan_file, [FORECAST])
    with RunFolder.create(tmp_path / "run", runfile.to_toml(run_file)) as folder:
        assert forecast_file.read(folder) is None
        forecast_file.record(folder, run_file)
        found = forecast_file.read(folder)
        assert found is not None and found["target_tokens"] == 20000
        assert {name: found["forecast"][name] for name in forecast_file.MEASURES} == {
            "seconds": 2, "bytes": 5, "dollars": 0, "rounds": 4,
        }  # fmt: skip
        folder.write(forecast_file.FILE, '{"forecast": {}}')
        with pytest.raises(UserError, match=r"plan\.json is damaged"):
            forecast_file.read(folder)


def test_ratios_are_forecast_over_outcome() -> None:
    came = forecast_file.Outcome(seconds=4.0, bytes=10, dollars=0.0, rounds=2)
    found = forecast_file.ratios({"seconds": 5, "bytes": 5, "dollars": 1, "rounds": 2}, came)
    assert found == {"seconds": 1.25, "bytes": 0.5, "dollars": float("inf"), "rounds": 1.0}
