"""The one place that imports OpenFHE, and that mends its wheel where the system is older than it.

The wheel on the Python Package Index is built against glibc 2.38 and GCC 13. On Debian 12,
Ubuntu 22.04 or RHEL 9 it does not load, although nothing in it needs the newer runtime: three
symbols are the C23 names of ``strtol``, ``strtoul`` and ``strtoull`` (they differ only in reading
``0b`` prefixes, which OpenFHE does not parse), and one is referred to but never bound. Renaming
the three and marking the two versions weak changes some twenty bytes.

``import_openfhe()`` does this by itself, says so through ``logging``, and touches nothing if the
import works or fails for another reason. ``python -m fedjax_llm.secure.openfhe_repair`` does the
same by hand, for instance while an image is built. Undo:
``pip install --force-reinstall --no-deps openfhe``.

Every file is replaced by a renamed copy, so that a crash leaves it old or new, never mixed; a
package manager's cache that shares the file by a hard link keeps the original. The new bytes
depend on the old ones only, so several processes may do this at once.
"""

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fedjax_llm.errors import UserError
from fedjax_llm.secure.elf_versions import NotElf, Recipe, apply, plan

logger = logging.getLogger(__name__)

RECIPE = Recipe(
    versions=frozenset({"GLIBC_2.38", "GLIBCXX_3.4.32"}),
    rename={f"__isoc23_{name}": name for name in ("strtol", "strtoul", "strtoull")},
    unused=frozenset({"_ZSt21ios_base_library_initv"}),
)
UNDO = "pip install --force-reinstall --no-deps openfhe"


@dataclass(frozen=True)
class FileRepair:
    """One library that was changed, and the reasons of the edits in words."""

    path: Path
    edits: tuple[str, ...]


@dataclass(frozen=True)
class RepairReport:
    """What a repair did; ``files`` is empty when there was nothing to do."""

    files: tuple[FileRepair, ...]

    def __str__(self) -> str:
        if not self.files:
            return "OpenFHE needs no repair"
        each = "; ".join(f"{file.path.name}: {', '.join(file.edits)}" for file in self.files)
        return f"OpenFHE repaired for this system's older C runtime ({each}); undo: {UNDO}"


def mendable(error: ImportError) -> bool:
    """Whether an import failed for the reason that this module mends, and no other."""
    return any(f"version `{version}' not found" in str(error) for version in RECIPE.versions)


def libraries(folder: Path) -> list[Path]:
    """The shared libraries of an installed ``openfhe`` package, in a fixed order."""
    return sorted(path for place in (folder, folder / "lib") for path in place.glob("*.so*"))


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _import_in_child(folder: Path) -> None:
    """Raises unless a fresh interpreter can import the package that lies in ``folder``."""
    code = f"import sys; sys.path.insert(0, {str(folder.parent)!r}); import openfhe"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"OpenFHE does not load even when repaired ({reason}); it is as it was")


def repair(folder: Path, verify: Callable[[Path], None] = _import_in_child) -> RepairReport:
    """Mends the libraries of the ``openfhe`` package in ``folder``; a second call does nothing.

    Args:
        folder: the installed package's folder (the one that holds ``__init__.py``).
        verify: called with ``folder`` after writing; raises to have everything put back.

    Raises:
        UserError: a library is no complete ELF file, asks for a symbol that has no equivalent
            here, cannot be written, or does not load afterwards. No library is changed then.
    """
    # All plans come before the first write: a library that is refused leaves all of them alone.
    planned = []
    for path in libraries(folder):
        before = path.read_bytes()
        try:
            edits = plan(before, RECIPE)
        except NotElf as err:
            raise UserError(f"{path}: {err}; reinstall it: {UNDO}") from err
        except UserError as err:
            raise UserError(f"{path.name}: {err}") from err
        if edits:
            planned.append((path, before, edits))
    written: list[tuple[Path, bytes]] = []
    try:
        for path, before, edits in planned:
            written.append((path, before))
            _replace(path, apply(before, edits))
        if planned:
            verify(folder)
    except BaseException as err:
        for path, before in written:
            if path.read_bytes() != before:
                _replace(path, before)
        if isinstance(err, OSError):
            raise UserError(
                f"{folder} cannot be written ({err.strerror}): run `python -m {__name__}` as the "
                "owner of that installation, or install into a virtual environment of your own"
            ) from err
        raise
    return RepairReport(
        tuple(FileRepair(path, tuple(edit.reason for edit in edits)) for path, _, edits in planned)
    )


def import_openfhe(report: Callable[[str], None] = logger.warning) -> ModuleType:
    """Imports OpenFHE, mending its installation first if (and only if) that is what it takes.

    Args:
        report: is told, in one line, what a repair did; not called if there was none.

    Raises:
        UserError: OpenFHE is not installed, or cannot be loaded or mended on this system.
    """
    # Read once, when the library starts: its threads would compete with the ones over clients.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return importlib.import_module("openfhe")
    except ModuleNotFoundError as err:
        raise UserError("OpenFHE is not installed: pip install openfhe") from err
    except ImportError as err:
        if not mendable(err):
            raise UserError(f"OpenFHE does not load: {err}".replace("\n", " ")) from err
    spec = importlib.util.find_spec("openfhe")
    if spec is None or spec.origin is None:
        raise UserError("OpenFHE is not installed: pip install openfhe")
    done = repair(Path(spec.origin).parent)
    if done.files:
        report(str(done))
    try:
        return importlib.import_module("openfhe")
    except ImportError as err:
        raise UserError(f"OpenFHE does not load: {err}".replace("\n", " ")) from err


if __name__ == "__main__":
    messages: list[str] = []
    try:
        import_openfhe(messages.append)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(messages[0] if messages else RepairReport(()))
