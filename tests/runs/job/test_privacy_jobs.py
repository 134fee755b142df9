"""[privacy] from a run file to a run's folder: units, mechanisms, budgets and refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.privacy import Banded, Buffered, LambdaCgd
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.folder import metrics
from fedjax_llm.runs.preview import planned

Jobs = Any


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def loaded(jobs: Jobs, *settings: str) -> runfile.RunFile:
    return runfile.load(jobs.run_file, list(settings))


def run(jobs: Jobs, out: Path, *settings: str) -> list[dict[str, Any]]:
    assert jobs.here("run", jobs.run_file, *words(*settings), "--out", out) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def plan_of(jobs: Jobs, *settings: str) -> Any:
    return planned.privacy_plan(loaded(jobs, *settings), on_event=lambda event: None)


@pytest.fixture
def by_users(tmp_path: Path) -> str:
    """A file of 24 users with one to three short texts each, as a setting of one cloud."""
    file = tmp_path / "notes.jsonl"
    rows = [
        {"who": f"user {user}", "text": f"note {user * 7 + item} about thing {user % 5}"}
        for user in range(24)
        for item in range(1 + user % 3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f'clouds.medical.data={{sources=["{file}"], eval_fraction=0.2, '
        'mapping={prompt="{who}:", answer="text", user="who"}}'
    )


ONLY_ONE = 'clouds=[{{name="medical", data={data}}}]'


def test_unit_user_clips_one_row_a_user(jobs: Jobs, tmp_path: Path, by_users: str) -> None:
    data = by_users.removeprefix("clouds.medical.data=")
    settings = (
        "rounds=2",
        "privacy.unit=user",
        "secure.sum=plain",
        "training.sequence_length=128",
        ONLY_ONE.format(data=data),
    )
    base = build.model(loaded(jobs, *settings), lambda event: None)
    (corpus,) = build.corpora(loaded(jobs, *settings), base, lambda event: None)
    users = {record.user for record in corpus.train_records}
    assert corpus.client_rows == (len(users),)
    assert corpus.train.segments_BxT.max() == 3  # several texts of one user in one row
    assert not users & {record.user for record in corpus.evaluation_records}
    records = run(jobs, tmp_path / "out", *settings)
    spent = plan_of(jobs, *settings)
    assert spent.unit == "user" and spent.units == (len(users),)
    assert records[-1]["epsilon"] == pytest.approx(spent.epsilon(2))
    statement = json.loads((tmp_path / "out" / "summary.json").read_text())["privacy_statement"]
    assert "one user of one cloud with all its examples there" in statement


def test_examples_that_do_not_fit_a_users_row_are_told(jobs: Jobs, by_users: str) -> None:
    data = by_users.removeprefix("clouds.medical.data=")
    settings = (
        "privacy.unit=user",
        "secure.sum=plain",
        "training.sequence_length=48",
        ONLY_ONE.format(data=data),
    )
    base = build.model(loaded(jobs, *settings), lambda event: None)
    (corpus,) = build.corpora(loaded(jobs, *settings), base, lambda event: None)
    assert corpus.report.over_row > 0
    said = f"{corpus.report.over_row} training examples left out because their user's row is full"
    assert said in corpus.report.lines()


@pytest.mark.parametrize(
    ("noise", "kind"),
    [
        (("privacy.noise=banded", "privacy.period=3"), Banded(6, 3)),
        (("privacy.noise=banded", "privacy.period=3", "privacy.bands=2"), Banded(6, 2)),
        (("privacy.noise=buffered", "privacy.buffers=2", "privacy.period=3"), Buffered(6, 2, 3)),
        (("privacy.noise=lambda-cgd", "privacy.cancelled=0.25"), LambdaCgd(6, 0.25)),
    ],
)
def test_correlated_noise_goes_by_its_name(jobs: Jobs, noise: tuple[str, ...], kind: Any) -> None:
    """Three rounds of two local steps; three rounds of one sum."""
    examples = plan_of(jobs, "privacy.unit=example", "privacy.noise_multiplier=1.0", *noise)
    assert examples.correlation == kind
    clients = plan_of(jobs, "privacy.noise_multiplier=1.0", "rounds=6", *noise)
    assert clients.correlation == kind and clients.trust == "central"


def test_a_job_with_banded_noise_goes_on_after_a_stop(jobs: Jobs, tmp_path: Path) -> None:
    settings = ("privacy.noise=banded", "privacy.period=2", "privacy.noise_multiplier=1.0")
    whole = run(jobs, tmp_path / "whole", *settings)
    out = tmp_path / "stopped"
    # Stopped by a budget of two rounds, then given more.
    two = plan_of(jobs, *settings).epsilon(2)
    assert two is not None
    part = run(jobs, out, *settings, f"privacy.budget={two * 1.0001}")
    assert [record["round"] for record in part] == [0, 1, 2]
    settings_file = out / "run.toml"
    text = settings_file.read_text()
    settings_file.write_text(re.sub(r"budget = [0-9.]+", "budget = 1000.0", text))
    assert jobs.here("resume", out) == 0
    assert jobs.state(out) == jobs.state(tmp_path / "whole")
    assert whole[-1]["epsilon"] == pytest.approx(
        json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"]
    )


def test_rounds_cannot_change_under_correlated_noise(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(jobs, out, "rounds=2", "privacy.noise=lambda-cgd", "privacy.noise_multiplier=1.0")
    toml = out / "run.toml"
    toml.write_text(toml.read_text().replace("rounds = 2", "rounds = 3", 1))
    capfd.readouterr()
    assert jobs.here("resume", out) == 2
    assert "correlated noise" in capfd.readouterr().err


def test_skellam_shares_inside_the_encrypted_sum(jobs: Jobs, tmp_path: Path) -> None:
    settings = (
        "rounds=1",
        "privacy.noise=skellam",
        "privacy.noise_multiplier=2.0",
        "privacy.dropouts=1",
        "privacy.delta=1e-3",
        "clouds.general.offline_rounds=[1]",
    )
    records = run(jobs, tmp_path / "out", *settings)
    plan = plan_of(jobs, *settings)
    # One of three may be lost, and each cloud knows its own share.
    assert plan.trust == "distributed" and plan.integer.shares.counted == 1
    assert records[-1]["epsilon"] == pytest.approx(plan.epsilon(1))
    # A cloud that was offline has spent nothing.
    assert records[-1]["clouds"]["medical"]["epsilon"] == pytest.approx(plan.epsilon(1))
    assert records[-1]["clouds"]["general"]["epsilon"] == 0
    statement = json.loads((tmp_path / "out" / "summary.json").read_text())["privacy_statement"]
    assert "opens no sum of fewer than 2 shares" in statement


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        (("privacy.delta=0.5",), Refused, r"delta must be above 0 and below 1/3"),
        (("privacy.clip_norm=-1.0",), UserError, "clip_norm must be greater than 0"),
        (("privacy.clip_norm=inf",), UserError, "clip_norm must be"),
        (("privacy.client_rate=1.5",), UserError, "client_rate must be at most 1"),
        (("privacy.clip_norm_from=data",), Refused, "looking at the private data"),
        (("privacy.sampling=fixed",), Refused, "fixed-size batches certify no epsilon"),
        (("privacy.budget=0.001",), Refused, "does not allow one round"),
        (("privacy.unit=user",), UserError, "unit user needs to know whose each row is"),
        (("privacy.unit=example", "privacy.noise=skellam"), UserError, "which is unit client"),
        (("privacy.trust=distributed",), UserError, "needs integer noise"),
        (("privacy.noise=skellam", "privacy.trust=central"), UserError, "the clients add"),
        (("privacy.unit=example", "privacy.trust=central"), UserError, 'must be "local"'),
        (("privacy.noise=banded",), UserError, "has one band, which is independent noise"),
        (
            ("privacy.unit=user", 'attack={name="label-flip", clouds=["medical"]}'),
            Refused,
            "gives examples the answers of others",
        ),
        (
            ("clouds.medical.clients=2", 'attack={name="label-flip", clouds=["medical"]}'),
            Refused,
            "gives examples the answers of others",
        ),
        (("privacy.bands=2",), UserError, 'goes with noise = "banded"; remove it'),
        (("privacy.cancelled=0.1",), UserError, 'goes with noise = "lambda-cgd"'),
        (("privacy.buffers=2",), UserError, 'goes with noise = "buffered"'),
        (("privacy.dropouts=1",), UserError, 'goes with trust = "distributed"'),
        (
            ("privacy.noise=skellam", "privacy.dropouts=3", "privacy.noise_multiplier=1.0"),
            Refused,
            "leave no share that hides",
        ),
        (
            ("privacy.noise=lambda-cgd", "privacy.adjacency=replace"),
            Refused,
            "neighbours by replacement",
        ),
        (("privacy.unit=example", "training.batch_size=50"), UserError, "cannot exceed 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    jobs: Jobs, settings: tuple[str, ...], kind: type[FedJaxError], match: str
) -> None:
    with pytest.raises(kind, match=match) as caught:
        plan_of(jobs, *settings)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        ("privacy.unit=example", "privacy.clip=per-factor", "aggregation.rule=factor-averaging"),
        pytest.param(("privacy.unit=example", "privacy.clip=per-layer"), marks=pytest.mark.drill),
        ("privacy.unit=example", "privacy.gradients=ghost"),
        ("privacy.unit=example", "privacy.adaptive={quantile=0.4}"),
        ("privacy.adaptive={count_stddev=2.0}",),
    ],
)
def test_ways_to_clip_run_by_their_names(
    jobs: Jobs, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    settings = (*settings, "rounds=1", "privacy.noise_multiplier=1.0", "secure.sum=plain")
    out = tmp_path / "out"
    records = run(jobs, out, *settings)
    assert records[-1]["epsilon"] == pytest.approx(plan_of(jobs, *settings).epsilon(1))
    # The folder can be read without building the federation.
    assert jobs.here("export", out, "--merged", tmp_path / "model") == 0


def test_secret_noise_repeats_within_a_run_and_in_no_other(jobs: Jobs, tmp_path: Path) -> None:
    """A stopped run goes on under the same noise; another run of the same seed has its own."""
    settings = (
        "rounds=2",
        "privacy.unit=example",
        "privacy.noise_multiplier=1.0",
        "privacy.generator=system",
        "secure.sum=plain",
    )
    run(jobs, tmp_path / "whole", *settings)
    secret = tmp_path / "whole" / "noise.key"
    assert len(secret.read_bytes()) == 32 and secret.stat().st_mode & 0o777 == 0o600
    out = tmp_path / "stopped"
    one = plan_of(jobs, *settings).epsilon(1)
    run(jobs, out, *settings, f"privacy.budget={one * 1.0001}")
    assert jobs.state(out) != jobs.state(tmp_path / "whole")
    first = (out / "noise.key").read_bytes()
    toml = out / "run.toml"
    toml.write_text(re.sub(r"budget = [0-9.]+", "budget = 1000.0", toml.read_text()))
    assert jobs.here("resume", out) == 0
    assert (out / "noise.key").read_bytes() == first != secret.read_bytes()
    assert jobs.state(out) != jobs.state(tmp_path / "whole")
    statement = json.loads((out / "summary.json").read_text())["privacy_statement"]
    assert "operating system's generator" in statement and "run's seed" not in statement


def test_a_run_that_lost_its_noise_key_does_not_go_on(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ("privacy.generator=system", "privacy.noise_multiplier=1.0", "secure.sum=plain")
    run(jobs, out, "rounds=1", *settings)
    toml = out / "run.toml"
    toml.write_text(toml.read_text().replace("rounds = 1", "rounds = 2", 1))
    (out / "noise.key").unlink()
    capfd.readouterr()
    assert jobs.here("resume", out) == 2
    assert "noise.key is gone" in capfd.readouterr().err
    (out / "noise.key").write_bytes(b"short")
    assert jobs.here("resume", out) == 2
    assert "is damaged: 5 bytes, not 32" in capfd.readouterr().err
    shutil.rmtree(out / "checkpoints")
    assert jobs.here("resume", out) == 2
    assert "released a second time, under other noise" in capfd.readouterr().err
    assert len(metrics.read(out / "metrics.jsonl")) == 2, "nothing is lost"
