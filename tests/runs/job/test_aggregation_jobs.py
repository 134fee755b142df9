"""[aggregation], [attack] and the clouds' own settings, from a run file to a run's folder."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation import RULES, SERVER_OPTIMIZERS, NormalisedMean
from fedjax_llm.aggregation.robust import COMBINES
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.folder import fingerprint, metrics

Jobs = Any
ONE_ROUND = (
    "rounds=1",
    "privacy.unit=none",
    "secure.sum=plain",
    "secure.update_bound=8.0",
    "aggregation.server_optimizer=sgd",
)


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def run(jobs: Jobs, out: Path, *settings: str) -> dict[str, Any]:
    assert jobs.here("run", jobs.run_file, *words(*ONE_ROUND, *settings), "--out", out) == 0
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def loaded(jobs: Jobs, *settings: str) -> runfile.RunFile:
    return runfile.load(jobs.run_file, [*ONE_ROUND, *settings])


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_runs_by_its_name(jobs: Jobs, name: str) -> None:
    assert (
        type(
            build.rule(loaded(jobs, f"aggregation.rule={name}", "aggregation.server_optimizer=sgd"))
        )
        is RULES[name]
    )


def test_every_server_optimiser_and_combination_goes_by_its_name(jobs: Jobs) -> None:
    for name in SERVER_OPTIMIZERS:
        assert build.rule(loaded(jobs, f"aggregation.server_optimizer={name}"))
    for name, made in COMBINES.items():
        settings = (
            f"aggregation.combine={name}",
            *(("aggregation.radius=0.5",) if name == "centred-clipping" else ()),
            "clouds.medical.clients=3",
        )
        assert build.combination(loaded(jobs, *settings)) == made(1, 0.5)
        with pytest.raises(UserError, match="3 clients cannot fill 2 groups"):
            loaded(jobs, *settings, "aggregation.groups=2")
    assert build.combination(loaded(jobs)) is None
    directions = ("aggregation.combine=normalised", "secure.update_bound=1.0")
    assert isinstance(build.combination(loaded(jobs, *directions)), NormalisedMean)


def test_a_hybrid_job_with_everything_on(jobs: Jobs, tmp_path: Path) -> None:
    """Two clients in one cloud, own ranks and steps, FedNova, public weights, control variates."""
    settings = (
        "secure.sum=threshold",
        "clouds.medical.clients=2",
        "clouds.finance.rank=1",
        "clouds.general.local_steps=1",
        "clouds.general.weight=2.0",
        "aggregation.weights=public",
        "aggregation.normalise_steps=true",
        "aggregation.server_optimizer=fedadam",
        "aggregation.server_learning_rate=0.01",
        "training.scaffold=true",
        "training.proximal=0.01",
    )
    record = run(jobs, tmp_path / "out", *settings)
    clouds = record["clouds"]
    assert list(clouds) == ["medical", "finance", "general"]
    assert [clouds[name]["examples"] for name in clouds] == [16, 8, 4]  # clients x steps x batch
    assert record["aggregation_error"] is None  # steps are normalised: no mean of products
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "summed inside it in the plain" in summary["secure_statement"]
    # Both the update and the variates of B, at least.
    config = build.model(loaded(jobs), lambda event: None).config
    ffa = 2 * config.num_layers * (config.num_heads + config.num_kv_heads) * config.head_dim
    assert summary["parameters_trained"] == 2 * ffa


def test_label_flip_changes_the_answers_of_its_clouds_alone(jobs: Jobs) -> None:
    base = build.model(loaded(jobs), lambda event: None)
    attack = ('attack={name="label-flip", clouds=["finance"]}',)
    honest, flipped = (
        build.corpora(loaded(jobs, *settings), base, lambda event: None)
        for settings in ((), attack)
    )
    for one, other in zip(honest, flipped, strict=True):
        same = [r.answer for r in one.train_records] == [r.answer for r in other.train_records]
        assert same == (one.name != "finance")
        assert [r.prompt for r in one.train_records] == [r.prompt for r in other.train_records]
        np.testing.assert_array_equal(one.evaluation.tokens_BxT, other.evaluation.tokens_BxT)


def test_an_attack_is_told_and_changes_the_round(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    honest = run(jobs, tmp_path / "honest")
    capfd.readouterr()
    attack = 'attack={name="sign-flip", clouds=["finance"], scale=4.0}'
    bad = run(jobs, tmp_path / "bad", attack)
    said = capfd.readouterr()
    assert "simulated attack: finance do sign-flip at scale 4" in " ".join(
        (said.out + said.err).split()
    )
    assert bad["loss_eval_nats"] > honest["loss_eval_nats"]
    assert honest["aggregation_error"] < 1e-3 < bad["aggregation_error"]


def test_gradient_exchange_sends_gradients_of_single_steps(jobs: Jobs) -> None:
    settings = ("aggregation.exchange=gradients", "training.local_steps=1")
    run_file = loaded(jobs, *settings, "training.learning_rate=1e-3")
    training = build.local_training(run_file, build.model(run_file, lambda event: None))
    update, _ = training.optimizer.update(jnp.ones(3), training.optimizer.init(jnp.ones(3)))
    np.testing.assert_array_equal(update, -np.ones(3))
    assert training.steps == 1


def test_personal_adapters_are_exported_by_name(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(jobs, out, "aggregation.rule=fedsa")
    capfd.readouterr()
    assert jobs.here("export", out, "--peft", tmp_path / "a") == UserError.exit_code
    assert "say whose with --cloud NAME" in capfd.readouterr().err
    for name in ("medical", "finance"):
        assert jobs.here("export", out, "--peft", tmp_path / name, "--cloud", name) == 0
    weights = [
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("medical", "finance")
    ]
    assert weights[0] != weights[1]


def test_what_is_folded_into_the_base_is_exported_merged(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fedjax_llm.models import load_model

    out, merged = tmp_path / "out", tmp_path / "merged"
    run(jobs, out, "aggregation.rule=flora")
    capfd.readouterr()
    assert jobs.here("export", out, "--peft", tmp_path / "a") == UserError.exit_code
    assert "export --merged OUT instead" in capfd.readouterr().err
    assert jobs.here("export", out, "--peft", tmp_path / "a", "--cloud", "medical") == 2
    assert "has one adapter for all clouds" in capfd.readouterr().err
    assert jobs.here("export", out, "--merged", merged) == 0
    residual = {
        name.split("'")[1]: np.frombuffer(data, dtype).reshape(shape)
        for name, (dtype, shape, data) in jobs.state(out).items()
        if ".residual" in name
    }
    base, after = (build.model(loaded(jobs), lambda event: None).base, load_model(merged).base)
    for name, change in residual.items():
        before = np.asarray(base["layers"][name]["kernel"])
        np.testing.assert_allclose(after["layers"][name]["kernel"], before + change, atol=1e-6)
        assert np.abs(change).max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        ("clouds.medical.rank=1",),
        ("clouds.medical.local_steps=1",),
        ("aggregation.weights=public", "clouds.finance.weight=2.0", "clouds.medical.weight=2.0"),
        ("clouds.medical.clients=2",),
        ('attack={name="scaled", clouds=["medical"]}',),
        ("aggregation.weights=loss", "clouds.medical.link={up_mbps=5.0}"),
    ],
)
def test_settings_that_move_results_are_part_of_a_run_s_identity(
    jobs: Jobs, settings: tuple[str, ...]
) -> None:
    run_file = loaded(jobs)
    base = build.model(run_file, lambda event: None)
    before, after = (
        fingerprint.of(loaded(jobs, *own), base, ()) for own in (settings[:-1], settings)
    )
    with pytest.raises(UserError, match="is not what its rounds ran with"):
        fingerprint.check(before, after, Path("run"))
    with pytest.raises(UserError, match="is not what its rounds ran with"):
        fingerprint.check(after, before, Path("run"))


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        (("aggregation.rule=flora", "secure.sum=threshold"), Refused, "has to read the message"),
        (("aggregation.combine=median", "secure.sum=masked"), Refused, "has to read the message"),
        (("privacy.unit=client", "aggregation.weights=examples"), Refused, "unit client is to"),
        (("privacy.unit=client", "aggregation.weights=loss"), Refused, "unit client is to"),
        (("privacy.unit=client", "aggregation.rule=hetlora"), Refused, "unit client is to"),
        (("privacy.unit=client", "aggregation.rule=fedask"), Refused, "2 sums a round"),
        (
            ("aggregation.rule=fedsvd", "aggregation.server_optimizer=fedadam"),
            UserError,
            "plain steps only",
        ),
        (("aggregation.rule=fedrot", "clouds.medical.rank=1"), UserError, "one rank for all"),
        (("aggregation.combine=krum",), UserError, "krum needs at least"),
        (
            ("aggregation.combine=normalised", "secure.update_bound=3.0"),
            UserError,
            "messages may be 3 long, and normalised ones have length 1",
        ),
        (("aggregation.weights=public",), UserError, "needs a weight in some"),
        (("clouds.medical.weight=2.0",), UserError, 'weights = "public"; remove it'),
        (("aggregation.byzantine=2",), UserError, "goes with combine = krum"),
        (("aggregation.radius=2.0",), UserError, "goes with combine = centred-clipping"),
        (("aggregation.loss_weights={alpha=1.0}",), UserError, "goes with weights = loss"),
        (
            ("aggregation.weights=loss", "aggregation.loss_weights={bound=3.0}"),
            UserError,
            "published rule has none",
        ),
        (("clouds.medical.partition=label",), UserError, "goes with clients above 1"),
        (
            ("clouds.medical.clients=2", "clouds.medical.concentration=0.1"),
            UserError,
            'partition = "dirichlet"',
        ),
        (
            ("aggregation.exchange=gradients", "training.local_steps=1"),
            UserError,
            "learning_rate has no effect",
        ),
        (
            (
                "aggregation.exchange=gradients",
                "training.local_steps=1",
                "training.learning_rate=1e-3",
                "aggregation.rule=flora",
            ),
            UserError,
            "has no meaning",
        ),
        (
            ('attack={name="label-flip", clouds=["medical"], scale=2.0}',),
            UserError,
            "does not go with label-flip",
        ),
        (
            ("privacy.unit=example", 'attack={name="label-flip", clouds=["medical"]}'),
            Refused,
            "covers a change of one",
        ),
        (
            ("privacy.unit=client", 'attack={name="gaussian", clouds=["medical"]}'),
            Refused,
            "no epsilon covers that",
        ),
        (
            ("privacy.unit=example", "aggregation.rule=hetlora", "aggregation.weights=tokens"),
            Refused,
            "number of tokens follow",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    jobs: Jobs, settings: tuple[str, ...], kind: type[UserError], match: str
) -> None:
    """When the file is read, before model and data are loaded."""
    with pytest.raises(kind, match=match) as caught:
        loaded(jobs, *settings)
    assert "\n" not in str(caught.value)


def test_rules_lists_every_rule_and_what_it_promises(capfd: pytest.CaptureFixture[str]) -> None:
    from fedjax_llm import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["rules"])
    assert not ended.value.code
    said = capfd.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    for name, rule in RULES.items():
        assert rule.summary in rows[name] and rule.source in rows[name]
    assert " yes " in rows["ffa"] and "personal" in rows["fedsa"]
    for name in (*COMBINES, "normalised"):
        assert name in rows
    assert "label-flip" in said and "diloco" in said


def test_metrics_tell_the_aggregation_error(jobs: Jobs, tmp_path: Path) -> None:
    run(jobs, tmp_path / "out", "aggregation.rule=factor-averaging")
    records = metrics.read(tmp_path / "out" / "metrics.jsonl")
    assert "aggregation_error" not in records[0]
    assert 1e-4 < records[1]["aggregation_error"] < 1


def test_a_round_that_began_to_open_a_sum_opens_no_other(tmp_path: Path) -> None:
    """Over other clouds the two totals would differ by one update; of other integers by something
    that no noise covers; over the same of the same they are equal."""
    from fedjax_llm.federation import ToOpen
    from fedjax_llm.runs.folder import RunFolder, opened

    def record(
        folder: RunFolder, number: int, clouds: str, digest: str = "0", place: int = 0
    ) -> None:
        opened.record(folder, ToOpen(number, place, tuple(clouds), digest), 4)

    with RunFolder.create(tmp_path / "run", "name = 'x'") as folder:
        record(folder, 3, "abc")
        record(folder, 3, "cba")
        with pytest.raises(Refused, match="round 3 began to open the sum of a, b, c"):
            record(folder, 3, "ab")
        record(folder, 4, "ab")
        record(folder, 4, "ab", "1", place=1)
        # A damaged checkpoint may take a run back by two rounds.
        with pytest.raises(Refused, match="round 3 began to open the sum of a, b, c"):
            record(folder, 3, "bc")
        with pytest.raises(Refused, match=r"integers that come out otherwise.*4 clients at once"):
            record(folder, 3, "abc", "1")
        with pytest.raises(Refused, match="integers that come out otherwise"):
            record(folder, 4, "ab", "2", place=1)
        assert opened.clients_at_once(folder, 3) == 4
        assert opened.clients_at_once(folder, 5) is None
        folder.opened.write_text("{")
        with pytest.raises(Refused, match="damaged"):
            record(folder, 5, "ab")


def test_a_job_records_what_it_opens(jobs: Jobs, tmp_path: Path) -> None:
    run(jobs, tmp_path / "out", "secure.sum=masked")
    record = json.loads((tmp_path / "out" / "opened.json").read_text())
    assert list(record) == ["1"]
    assert record["1"]["clouds"] == ["medical", "finance", "general"]
    assert list(record["1"]["sums"]) == ["0"]
    assert len(record["1"]["sums"]["0"]) == 64
