"""Run folders: one writer, nothing overwritten, nothing touched that is not understood."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import RunFolder, disk


def listing(path: Path) -> dict[str, bytes]:
    return {
        str(entry.relative_to(path)): entry.read_bytes()
        for entry in path.rglob("*")
        if entry.is_file()
    }


def test_create_then_open(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "run", "rounds = 1\n") as folder:
        assert folder.run_toml.read_text() == "rounds = 1\n"
    assert RunFolder.open(tmp_path / "a" / "run").path == tmp_path / "a" / "run"


def test_a_finished_round_is_never_overwritten(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "x = 1\n") as folder:
        (folder.checkpoints / "0").mkdir(parents=True)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"fedjax-llm resume .*run`, or choose another .* --out"):
        RunFolder.create(tmp_path / "run", "x = 2\n")
    assert listing(tmp_path) == before


def test_a_run_that_ended_before_its_first_round_may_be_replaced(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "x = 1\n").close()
    with RunFolder.create(tmp_path / "run", "x = 2\n") as folder:
        assert folder.run_toml.read_text() == "x = 2\n"


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis.tex"):
        RunFolder.create(tmp_path, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", "")


@pytest.mark.parametrize("line", ["", "fedjax-llm run folder, format 0\n", "x", "\n"])
def test_another_layout_is_refused_and_not_touched(tmp_path: Path, line: str) -> None:
    RunFolder.create(tmp_path / "run", "x = 1\n").close()
    (tmp_path / "run" / "format").write_text(line)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = listing(tmp_path)
    with pytest.raises(UserError, match="another version of fedjax-llm"):
        RunFolder.open(tmp_path / "run", write=True)
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.create(tmp_path / "run", "x = 2\n")
    assert listing(tmp_path) == before


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file `format`"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nope")


def test_two_processes_cannot_write_to_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from fedjax_llm.runs.folder import RunFolder\n"
        "try: RunFolder.open(sys.argv[1], write=True)\n"
        "except Exception as error: print(error)\n"
        "else: print('open')"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True
        )
        return done.stdout

    with RunFolder.create(tmp_path / "run", ""):
        assert "another process is writing" in other()
        RunFolder.open(tmp_path / "run")  # reading is always possible
    assert other() == "open\n"


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    disk.atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: could not write .*file"):
        disk.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_recognised_through_other_errors() -> None:
    wrapped = ValueError("OUT_OF_RANGE: failed: No space left on device [os_error_code='28']")
    assert disk.is_full_disk(wrapped)
    assert disk.is_full_disk(ExceptionGroup("several", [KeyError(1), OSError(28, "full")]))
    assert not disk.is_full_disk(OSError(2, "No such file"))


def test_asking_for_space_leaves_no_name_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it asks must not leave a file as large as a checkpoint."""
    seen: list[list[Path]] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: seen.append(list(tmp_path.iterdir())))
    disk.reserve(tmp_path, 1 << 30)
    assert seen == [[]]
