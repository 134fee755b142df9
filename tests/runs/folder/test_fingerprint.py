"""A run is continued with what it began with, and with nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import fingerprint
from fedjax_llm.runs.runfile import RunFile

FOLDER = Path("runs/three")


def settings(**changes: Any) -> RunFile:
    plain: dict[str, Any] = {
        "name": "three",
        "rounds": 3,
        "model": {"name": "smollm2-135m"},
        "clouds": [{"name": name, "data": {"sources": ["builtin:medical"]}} for name in ("a", "b")],
    }
    return RunFile.model_validate(plain | changes)


def base(weight: float = 1.0, config: str = "small", tokenizer: str = "t") -> Any:
    weights = {"layers": np.full((2, 3), weight, np.float32), "empty": np.zeros((0,), np.float32)}
    return SimpleNamespace(config=config, base=weights, tokenizer=SimpleNamespace(sha256=tokenizer))


def corpora(train: int = 0, evaluation: int = 0) -> list[Any]:
    return [
        SimpleNamespace(
            name=name, train=np.full((4, 5), train), evaluation=np.full((2, 5), evaluation)
        )
        for name in ("a", "b")
    ]


SAVED = fingerprint.of(settings(), base(), corpora())


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 9},
        {"checkpoint": {"keep": 5}},
        {"evaluation": {"every_rounds": 2, "prompt": "Why?"}},
        {"training": {"microbatch": 1, "remat": True, "clients_at_once": 2}},
        {"model": {"path": "elsewhere"}},
    ],
)
def test_what_may_change_between_two_processes(changes: dict[str, Any]) -> None:
    fingerprint.check(SAVED, fingerprint.of(settings(**changes), base(), corpora()), FOLDER)


@pytest.mark.parametrize(
    ("part", "now"),
    [
        ("seed", (settings(seed=1), base(), corpora())),
        (
            r"section \[privacy\]",
            (settings(privacy={"noise_multiplier": 2.0}), base(), corpora()),
        ),
        (r"section \[training\]", (settings(training={"batch_size": 9}), base(), corpora())),
        (r"section \[secure\]", (settings(secure={"sum": "threshold"}), base(), corpora())),
        ("model", (settings(), base(weight=np.nextafter(np.float32(1), 2)), corpora())),
        ("model", (settings(), base(config="other"), corpora())),
        ("tokenizer", (settings(), base(tokenizer="u"), corpora())),
        ("data of cloud 'a'", (settings(), base(), corpora(train=1))),
        ("data of cloud 'a'", (settings(), base(), corpora(evaluation=1))),
    ],
)
def test_what_may_not(part: str, now: tuple[Any, Any, Any]) -> None:
    with pytest.raises(UserError, match=f"the {part} at hand is not what") as caught:
        fingerprint.check(SAVED, fingerprint.of(*now), FOLDER)
    assert "\n" not in str(caught.value)


def test_a_cloud_s_batch_counts_where_it_is_its_own() -> None:
    def with_batch(size: int) -> Any:
        own = settings()
        clouds = [cloud.model_dump() | {"batch_size": size} for cloud in own.clouds]
        return fingerprint.of(settings(clouds=clouds), base(), corpora())

    of_run = settings().training.batch_size
    fingerprint.check(SAVED, with_batch(of_run), FOLDER)
    with pytest.raises(UserError, match="the settings of the clouds at hand is not"):
        fingerprint.check(SAVED, with_batch(of_run - 1), FOLDER)


def test_clouds_in_another_order_are_another_run() -> None:
    """Their place addresses their randomness."""
    run_file = settings()
    turned = run_file.model_copy(update={"clouds": run_file.clouds[::-1]})
    with pytest.raises(UserError, match="the clouds at hand is not what"):
        fingerprint.check(SAVED, fingerprint.of(turned, base(), corpora()), FOLDER)


def test_a_checkpoint_that_does_not_say_is_not_continued() -> None:
    with pytest.raises(UserError, match="is not what its rounds ran with"):
        fingerprint.check({}, SAVED, FOLDER)


def test_a_sensitivity_map_counts_by_its_content(tmp_path: Path) -> None:
    def with_map(name: str, content: bytes) -> fingerprint.Fingerprint:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        secure = {"sum": "threshold", "selective": {"fraction": 0.5, "map": str(path)}}
        return fingerprint.of(
            settings(secure=secure, privacy={"unit": "example"}), base(), corpora()
        )

    before = with_map("one/map.npy", b"1")
    fingerprint.check(before, with_map("two/map.npy", b"1"), FOLDER)
    with pytest.raises(UserError, match=r"section \[secure\]"):
        fingerprint.check(before, with_map("one/map.npy", b"2"), FOLDER)


def test_public_text_counts_by_its_content(tmp_path: Path) -> None:
    def measured_on(name: str, content: str) -> fingerprint.Fingerprint:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text(content)
        selective = {
            "fraction": 0.5,
            "measure_on": ["builtin:general", str(folder)],
            "mapping": {"prompt": "a", "answer": "b"},
        }
        changes = {"secure": {"sum": "bfv", "selective": selective}, "privacy": {"unit": "example"}}
        return fingerprint.of(settings(**changes), base(), corpora())

    before = measured_on("one", "x")
    fingerprint.check(before, measured_on("two", "x"), FOLDER)
    with pytest.raises(UserError, match=r"section \[secure\]"):
        fingerprint.check(before, measured_on("one", "y"), FOLDER)
