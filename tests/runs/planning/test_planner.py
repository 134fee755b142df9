"""Plans end in a run file whose run takes what was forecast, or in one clear line."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.runs import job, planning, runfile
from fedjax_llm.runs.folder import RunFolder, forecast_file, metrics
from fedjax_llm.runs.planning.candidates import Candidate
from fedjax_llm.runs.planning.effects import effects
from fedjax_llm.runs.planning.noise import noise_for
from fedjax_llm.runs.planning.screen import Screen
from fedjax_llm.runs.planning.table import rows
from fedjax_llm.runs.sections.schedule import ScheduleSection

PRIVATE = (
    "privacy.unit=example",
    "privacy.noise_multiplier=0.8",
    "privacy.delta=1e-3",
    "privacy.budget=6.0",
)
# One candidate, so that the search is short.
ALONE = (
    "plan.schedules=['synchronous']",
    "plan.local_steps=[2]",
    "plan.ranks=[2]",
    "plan.bits=[]",
    "plan.pilots=1",
)


@pytest.mark.parametrize("measure", ["seconds", "dollars", "bytes"])
def test_tokens_are_reached_for_the_least(
    measure: str, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(*arguments: object) -> None:
        raise AssertionError("a plan of tokens trains nothing")

    monkeypatch.setattr("fedjax_llm.federation.Federation.__init__", trains)
    planned = planning.make(runfile.load(plan_file, [f"plan.minimise={measure}"]))
    values = [getattr(own, measure) for own in planned.forecasts]
    assert values == sorted(values) and planned.candidates > 50
    (tmp_path / "out.toml").write_text(runfile.to_toml(planned.run_file))
    assert runfile.load(tmp_path / "out.toml") == planned.run_file
    assert planned.run_file.rounds == planned.chosen.rounds
    assert all(len(row) == len(rows(planned)[0]) for row in rows(planned))
    # A budget of half is refused with what is needed.
    half = values[0] / 2
    with pytest.raises(UserError, match=f"max_{measure}.*the least is") as error:
        planning.make(
            runfile.load(plan_file, [f"plan.minimise={measure}", f"plan.max_{measure}={half}"])
        )
    least = float(str(error.value).split("the least is ")[1].split(")")[0])
    assert least == pytest.approx(values[0], rel=1e-3) and "\n" not in str(error.value)


def test_a_run_that_stops_at_its_target_takes_what_was_forecast(
    plan_file: Path, tmp_path: Path
) -> None:
    text = plan_file.read_text().replace("target_tokens = 20000", "target_loss = 4.0")
    file = tmp_path / "loss.toml"
    file.write_text(text)
    planned = planning.make(runfile.load(file, [*ALONE, "secure.sum=masked"]))
    run_file, best = planned.run_file, planned.chosen
    assert run_file.evaluation.target_loss == 4.0
    with RunFolder.create(tmp_path / "run", runfile.to_toml(run_file)) as folder:
        result = job.run(run_file, folder)
        found = forecast_file.read(folder)
        assert found is not None
        ratios = forecast_file.ratios(found["forecast"], forecast_file.outcome(folder))
        losses = [own["loss_eval_nats"] for own in metrics.read(folder.metrics)]
    # The first round at the target is the last.
    assert losses[-1] <= 4.0 < min(losses[:-1])
    assert best.low <= result.rounds <= best.high
    if best.pilot_rounds == best.rounds:
        # The pilot got there: its rounds are the run's.
        assert ratios["seconds"] == pytest.approx(1) and ratios["dollars"] == pytest.approx(1)
        assert ratios["rounds"] == 1 and ratios["bytes"] == pytest.approx(1, rel=0.03)
    # It has ended, though not after all its rounds: resuming trains nothing.
    assert job.resume(tmp_path / "run").rounds == result.rounds


@pytest.mark.parametrize(
    ("target", "words"),
    [(0.01, "out of sight|too far to forecast"), (20.0, "reached before training")],
)
def test_targets_that_mean_nothing_are_refused(
    target: float, words: str, plan_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "loss.toml"
    text = plan_file.read_text().replace("target_tokens = 20000", f"target_loss = {target}")
    file.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        planning.make(runfile.load(file, [*ALONE, "plan.max_pilot_rounds=4"]))
    assert "\n" not in str(error.value)


def test_no_plan_is_refused(plan_file: Path) -> None:
    run_file = runfile.load(plan_file).model_copy(update={"plan": None})
    with pytest.raises(UserError, match=r"has no \[plan\]"):
        planning.make(run_file)


@pytest.mark.parametrize("name", ["synchronous", "decoupled"])
def test_noise_keeps_the_budget_and_no_more(name: str, case: Callable) -> None:
    own = case(*PRIVATE)
    quorum = 2 if name == "decoupled" else None
    one = Candidate(2, 2, None, ScheduleSection(name=name, quorum=quorum))
    screen = Screen(own.run_file, own.base, own.data)
    found = noise_for(own.run_file, screen, one, 12, screen.outlook(one, 12))
    epsilon = found.epsilon(12)
    assert epsilon is not None and 0.97 * 6.0 <= epsilon <= 6.0
    fewer = noise_for(own.run_file, screen, one, 3, screen.outlook(one, 3))
    assert fewer.multiplier < found.multiplier


def test_a_budget_that_no_noise_keeps_is_refused(case: Callable) -> None:
    own = case(*PRIVATE[:2], "privacy.delta=1e-12", "privacy.budget=1e-6")
    one = Candidate(2, 2, None, ScheduleSection())
    screen = Screen(own.run_file, own.base, own.data)
    with pytest.raises(FedJaxError, match="budget") as error:
        noise_for(own.run_file, screen, one, 4, screen.outlook(one, 4))
    assert "\n" not in str(error.value)


def test_effects_add_up_where_choices_do() -> None:
    """Work of 100 local steps, doubled by 8 bits, halved by rank 4: pairs tell of the fourth."""

    def one(rank: int, bits: int) -> Candidate:
        return Candidate(2, rank, bits, ScheduleSection())

    seen = {one(2, 16): 100.0, one(2, 8): 200.0, one(4, 16): 50.0}
    model = effects(list(seen), list(seen.values()))
    assert model.work(one(4, 16)) < model.work(one(4, 8)) < model.work(one(2, 8))
    # Shrunk towards the mean: never further from it than what was seen.
    mean = math.exp(model.mean)
    for candidate, work in seen.items():
        assert min(mean, work) - 1e-9 <= model.work(candidate) <= max(mean, work) + 1e-9
