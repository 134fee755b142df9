"""Writing so that nothing is lost: atomic renames, and a full disk as a user error."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedjax_llm.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def atomic_write(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Replaces a file as a whole: after a crash it holds the old bytes or the new ones.

    Args:
      path: the file.
      content: of it.
      mode: permissions, less the process's mask.

    Raises:
      UserError: the disk is full; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    # The name says which process it belongs to; a leftover of a dead one is overwritten by chance
    # at most, and never read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_is_a_user_error(path):
        try:
            temporary.unlink(missing_ok=True)  # it might have other permissions
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def reserve(folder: Path, size: int, slack: int = 1 << 20) -> None:
    """Finds out whether `size` bytes (and some `slack` for names and indexes) can be written.

    Raises:
      OSError: the disk, the quota or the limit on a file's size does not allow it.
    """
    # Without a name, so that a process killed here leaves no file of that size behind.
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size + slack)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; a rename alone may be lost when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_is_a_user_error(path: Path) -> Iterator[None]:
    """Turns "no space left" from any layer below into one line that says how to go on."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"the disk is full: could not write {path}; everything written before is intact: "
            "free some space, then use `fedjax-llm resume`"
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it wraps, says that nothing more can be written.

    TensorStore raises ValueError with the text of errno, not OSError, hence the look at the words.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        words = str(error)
        if any(os.strerror(number) in words for number in _FULL):
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(is_full_disk(inner) for inner in error.exceptions)
        error = error.__cause__ or error.__context__
    return False
