"""The run folder: all that a run leaves behind, owned by one process at a time.

run.toml         the resolved run file          metrics.jsonl   one line per round
summary.json     the result                     checkpoints/    orbax, the last few rounds
report.html      the result, to look at         tensorboard/    the same scalars
format           the version of this layout     opened.json     whose sum was opened last
noise.key        secret root of noise and samples, where the run file asks for one; as secret as
                 it are the checkpoints then
audit.json       lower bound on epsilon, where the run has been audited
timeline.json    who did what when in virtual time
harmonise.json   what was changed in the data of each cloud, where the run harmonises
plan.json        what `fedjax-llm plan` expected of the run, where it wrote the run file
.lock            held by the process that writes
"""

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import disk

FORMAT = 1
SECRET_BYTES = 32
_FORMAT_LINE = "fedjax-llm run folder, format {}\n"
# What a run leaves that ended before its first round; it is no result, so a new run may take it.
_SKELETON = {
    ".lock",
    "run.toml",
    "format",
    "tensorboard",
    "checkpoints",
    "noise.key",
    "harmonise.json",
    "plan.json",
    "timeline.json",
}


@dataclass
class RunFolder:
    """A folder of one run. Use it as a context manager; leaving releases the lock.

    Attributes:
      path: the folder.
    """

    path: Path
    _lock: int | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: str | Path, run_toml: str) -> Self:
        """Makes and locks the folder of a new run and writes its resolved run file.

        Raises:
          UserError: it holds a run, or something else, already; nothing there is touched.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose a folder with --out")
        present = {entry.name for entry in path.iterdir()} if path.exists() else set()
        strange = {name for name in present - _SKELETON if not name.endswith(".tmp")}
        if "format" in present and (strange or _has_checkpoint(path)):
            raise UserError(
                f"{path} already holds a run: continue it with `fedjax-llm resume {path}`, "
                "or choose another folder with --out"
            )
        if strange:
            raise UserError(
                f"{path} is not empty (it holds {min(strange)}) and holds no run of this version; "
                "choose another folder with --out"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
        folder = cls(path, _take_lock(path))
        disk.atomic_write(folder.run_toml, run_toml)
        # Last, because it is what makes the folder a run.
        disk.atomic_write(path / "format", _FORMAT_LINE.format(FORMAT))
        return folder

    def noise_secret(self) -> bytes:
        """The secret root of the run's noise, made by the first process and kept.

        A round that is repeated after a crash has to add the same noise again: with other noise the
        same sum would be released twice. Checkpoints of correlated noise hold what follows from it,
        so that the folder's checkpoints are closed to others as well.

        Raises:
          UserError: the file is damaged, or gone from a run that has begun; or the checkpoints
            are gone.
        """
        file = self.path / "noise.key"
        self.checkpoints.mkdir(mode=0o700, exist_ok=True)
        self.checkpoints.chmod(0o700)
        if not _has_checkpoint(self.path):
            if self.opened.exists() or _has_round(self.metrics):
                raise UserError(
                    f"{self.checkpoints}: no checkpoint is left of rounds that were released; run "
                    "again they would be released a second time, under other noise: begin a new run"
                )
            # Nothing has been released under an old one, whatever it was for.
            secret = os.urandom(SECRET_BYTES)
            disk.atomic_write(file, secret, mode=0o600)
            return secret
        try:
            secret = file.read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"{file} is gone, and with it the noise of this run: a round run again would be "
                "released under other noise; begin a new run"
            ) from None
        if len(secret) != SECRET_BYTES:
            raise UserError(
                f"{file} is damaged: {len(secret)} bytes, not {SECRET_BYTES}; begin a new run"
            )
        return secret

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Self:
        """Opens the folder of an existing run; with `write`, locks it.

        Raises:
          UserError: no run there, a layout of another version, or another process is writing to it;
            nothing is touched.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
        try:
            line = (path / "format").read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"{path} is not a run folder of fedjax-llm: it has no file `format`"
            ) from None
        if line != _FORMAT_LINE.format(FORMAT):
            version = line.rsplit(maxsplit=1)[-1][:20] if line.strip() else "none"
            raise UserError(
                f"{path} has the layout of another version of fedjax-llm (format {version}, this "
                f"version reads {FORMAT}); use the version that made it, or start a new run"
            )
        return cls(path, _take_lock(path) if write else None)

    @property
    def run_toml(self) -> Path:
        """The resolved run file."""
        return self.path / "run.toml"

    @property
    def metrics(self) -> Path:
        """One line of JSON per round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The result of a run that has ended."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def opened(self) -> Path:
        """Whose sum the last round between clouds opened; see `opened`."""
        return self.path / "opened.json"

    @property
    def timeline(self) -> Path:
        """Who did what when in virtual time; see `timeline_file`."""
        return self.path / "timeline.json"

    @property
    def harmonised(self) -> Path:
        """What was changed in the data of each cloud; see `harmonising`."""
        return self.path / "harmonise.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    def write(self, name: str, content: bytes | str) -> Path:
        """Writes a whole file of the folder atomically and returns its path."""
        path = self.path / name
        disk.atomic_write(path, content)
        return path

    def close(self) -> None:
        """Releases the lock; the system does the same when the process dies."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """The folder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the lock."""
        self.close()


def _has_checkpoint(path: Path) -> bool:
    return any(entry.name.isdecimal() for entry in (path / "checkpoints").glob("*"))


def _has_round(metrics: Path) -> bool:
    """Whether a round after the evaluation before training is recorded, or a damaged line."""
    try:
        lines = metrics.read_text().splitlines()
    except FileNotFoundError:
        return False
    return any('"round": 0,' not in line for line in lines if line.strip())


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"another process is writing to {path}; wait for it or stop it") from None
    return descriptor
