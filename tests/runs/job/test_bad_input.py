"""Bad input to whole jobs: one clear line, the right exit code, and nothing lost."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs.folder.checkpoints import Checkpoints

# Defined in conftest.py, from which nothing can be imported.
Jobs = Any

ROWS = "".join(f'{{"q": "What is {n}?", "a": "It is {n}."}}\n' for n in range(20))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def words(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err
    assert error.startswith("fedjax-llm: ") and error.endswith("\n")
    assert error.count("\n") == 1, error
    return error.removeprefix("fedjax-llm: ").strip()


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        (["model.path=nowhere"], 2, "[model] path: there is no "),
        (["adapter.rank=65"], 2, "rank 65 exceeds the size of q_proj, 64 x 64; use a rank of at "),
        (["privacy.clip_norm=0.0"], 2, "[privacy] clip_norm must be greater than 0, got 0.0"),
        (["secure.threshold=4"], 2, "[secure] threshold must be between 2 and 3, the number of "),
        (["clouds.finance.data.sources=['nowhere.csv']"], 2, "data needs a mapping from columns"),
        (["clouds.finance.data.limit=100000"], 2, "cloud 'finance': limit = 100000, but "),
        (["training.sequence_length=8"], 2, "cloud 'medical': no training example fits into 8 "),
        (["secure.sum=threshold", "secure.threshold=1"], 3, "every cloud could decrypt alone"),
        (["secure.minimum_clients=1"], 3, "the sum of one cloud is its update"),
        (["secure.selective={layers=['*q_proj*']}"], 3, 'selective needs [privacy] unit = "exam'),
        (
            ["privacy.unit=example", "secure.selective={layers=['*k_proj*']}"],
            2,
            "selective layers: '*k_proj*' matches no trained parameter",
        ),
        (
            ["privacy.unit=example", "secure.selective={layers=['*']}"],
            2,
            "layers * encrypts every parameter; leave selective out",
        ),
        (["privacy.sampling=fixed"], 3, "fixed-size batches certify no epsilon"),
    ],
)
def test_a_setting_that_cannot_work(
    jobs: Jobs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    settings: list[str],
    code: int,
    expected: str,
) -> None:
    out = tmp_path / "out"
    assert jobs.here("run", jobs.run_file, *words(settings), "--out", out) == code
    assert expected in error_line(capfd)
    assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", ROWS + '{"q": "What now?", "a": \n', "rows.jsonl, line 21: "),
        ("rows.jsonl", ROWS + "[1, 2]\n", "rows.jsonl, line 21: a JSON array, not an object"),
        ("rows.jsonl", "", "rows.jsonl"),
        ("rows.csv", "q,a\n", "rows.csv"),
        ("rows.csv", 'q,a\nwhy,"because\n', "rows.csv, line 2: "),
        ("rows.parquet", "not parquet", "rows.parquet: not a sound parquet file"),
        ("rows.jsonl", '{"question": "Why?", "a": "So."}\n', "'q'"),
        ("rows.jsonl", '{"q": "Why?", "a": "So."}\n', "cloud 'finance'"),
    ],
)
def test_bad_data_names_the_cloud_and_the_place(
    jobs: Jobs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str,
    expected: str,
) -> None:
    data = tmp_path / "data" / name
    data.parent.mkdir()
    data.write_text(content)
    before = contents(data.parent)
    settings = [
        f"clouds.finance.data.sources=['{data}']",
        "clouds.finance.data.mapping={prompt = 'q', answer = 'a'}",
    ]
    assert jobs.here("run", jobs.run_file, *words(settings), "--out", tmp_path / "out") == 2
    line = error_line(capfd)
    assert "cloud 'finance': " in line and expected in line
    assert contents(data.parent) == before


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def poison(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, weights)


def misname(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.norm.gain"] = tensors.pop("model.norm.weight")
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "model.safetensors"),
        (poison, "tensor model.norm.weight holds NaN or infinite values"),
        (misname, "model lacks tensor model.norm.weight"),
        (Path.unlink, "model.safetensors"),
        (lambda weights: (weights.parent / "config.json").write_text("{"), "config.json"),
        (lambda weights: (weights.parent / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_model_is_named(
    jobs: Jobs,
    stories260k: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Any,
    expected: str,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in stories260k.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    damage(model / "model.safetensors")
    before = contents(model)
    settings = words([f"model.path='{model}'"])
    assert jobs.here("run", jobs.run_file, *settings, "--out", tmp_path / "out") == 2
    line = error_line(capfd)
    assert str(model) in line and expected in line
    assert contents(model) == before


@pytest.mark.slow
def test_too_few_live_clouds_keep_the_rounds_before(
    jobs: Jobs, never_killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ["clouds.finance.offline_rounds=[2]", "clouds.general.offline_rounds=[2]"]
    assert jobs.here("run", jobs.run_file, *words(settings), "--out", out) == Refused.exit_code
    refusal = error_line(capfd)
    assert refusal == (
        "decryption needs 2 of 3 clouds, 1 alive, missing finance, general; start one of them again"
    )
    assert Checkpoints(out / "checkpoints").rounds() == [0, 1]
    kept = jobs.state(out)
    assert jobs.rounds(out) == jobs.rounds(never_killed)[:2]

    assert jobs.here("resume", out) == Refused.exit_code
    assert error_line(capfd) == refusal
    assert jobs.state(out) == kept

    # With the clouds back the run goes on as if they had never been away.
    run_toml = (out / "run.toml").read_text()
    assert run_toml.count("offline_rounds") == 3
    lines = ["" if "offline_rounds" in line else line for line in run_toml.splitlines()]
    text = run_toml.replace("    2,\n", "")
    (out / "run.toml").write_text(text if text != run_toml else "\n".join(lines))
    assert jobs.here("resume", out) == 0
    assert jobs.state(out) == jobs.state(never_killed)


def test_a_run_folder_is_never_overwritten(
    jobs: Jobs, never_killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(never_killed, tmp_path / "out")
    before = contents(out)
    assert jobs.here("run", jobs.run_file, "--out", out) == UserError.exit_code
    assert error_line(capfd).startswith(f"{out} already holds a run: continue it with `fedjax-llm ")
    assert contents(out) == before


def test_an_old_run_folder_is_not_touched(
    jobs: Jobs, never_killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(never_killed, tmp_path / "out")
    (out / "format").write_text("fedjax-llm run folder, format 0\n")
    before = contents(out)
    for command in (
        ["resume", out],
        ["report", out],
        ["compare", out],
        ["export", out, "--peft", tmp_path / "peft"],
    ):
        assert jobs.here(*command) == UserError.exit_code
        assert "has the layout of another version of fedjax-llm (format 0, " in error_line(capfd)
    assert contents(out) == before
    assert not (tmp_path / "peft").exists()


def test_damaged_weights_leave_a_run_as_it_was(
    jobs: Jobs,
    never_killed: Path,
    stories260k: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run whose model has gone bad is not continued, and can be once it is mended."""
    out = shutil.copytree(never_killed, tmp_path / "out")
    model = tmp_path / "model"
    model.mkdir()
    for file in stories260k.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    poison(model / "model.safetensors")
    run_toml = (out / "run.toml").read_text()
    (out / "run.toml").write_text(
        run_toml.replace(str(stories260k), str(model)).replace("rounds = 3", "rounds = 4", 1)
    )
    before = contents(out)
    assert jobs.here("resume", out) == UserError.exit_code
    assert "NaN" in error_line(capfd)
    assert contents(out) == before
