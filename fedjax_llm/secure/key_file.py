"""Files that hold secrets: owner-only, whole or not at all, and checked before they are believed.

Layout: a wire frame (``wire``: magic, kind, lengths, SHA-256 over everything) whose first field is
the version. Never pickle: reading calls nothing but ``struct`` and ``hashlib``.

| what is found | behaviour |
|---|---|
| group or others can read or write the file | ``UserError``, with the command that cures it |
| it belongs to another user, is a link, a folder or a pipe | ``UserError`` |
| truncated, extended or changed by as much as a bit | ``UserError`` |
| another kind of key file, or another version | ``UserError`` |
| a kill or a full disk while writing | the file of before, whole; ``Lock`` removes the new one |
| another process has the file open (``Lock``) | ``UserError`` |

Not covered: someone who can write as this user, an older copy put back in the file's place (it
forgets what has been answered since), and deleted bytes that remain on the medium. The file is not
encrypted: protect the disk.
"""

import contextlib
import fcntl
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedjax_llm.errors import UserError
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.sums import BadMessage

VERSION = 1
_MAX_BYTES = 2**30
_PART_BYTES = 8
_MADE_ANEW = "restore it from a backup of its latest state, or make new keys"


def write(path: Path, kind: str, fields: Sequence[bytes]) -> None:
    """Replaces the file as a whole; when this returns, it is on the disk.

    Raises:
        UserError: it cannot be written. The file is the one of before, or, if only its folder could
            not be brought to the disk, the new one, which a loss of power may undo.
    """
    data = frame(kind, VERSION.to_bytes(2, "little"), *fields)
    # Never the final name: a file that is there may be readable by others, or a link.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_PART_BYTES)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as err:
        raise UserError(
            f"cannot write the key file {path} ({err.strerror}); make its folder writable and not "
            "full"
        ) from err


def _sync_folder(folder: Path) -> None:
    """The rename too has to survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, kind: str, fields: int) -> list[bytes]:
    """The fields that ``write`` was given.

    Raises:
        UserError: naming the file and the cure; see the module's table.
    """
    data = _read_owned(path)
    with contents_of(path):
        version, *rest = unframe(kind, fields + 1, data, str(path))
        # A number of thousands of bytes would be one that Python refuses to print.
        if len(version) != 2:
            raise BadMessage(str(path), f"a version of {len(version)} bytes, not 2")
    if version != VERSION.to_bytes(2, "little"):
        raise UserError(
            f"key file {path} has version {int.from_bytes(version, 'little')}, this program reads "
            f"{VERSION}; use the program that wrote it"
        )
    return rest


@contextlib.contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Turns a refusal of a file's bytes into the user's error: nobody sent them."""
    try:
        yield
    except BadMessage as err:
        raise UserError(f"key file {path} is damaged or foreign ({err}); {_MADE_ANEW}") from err


def _read_owned(path: Path) -> bytes:
    try:
        # Non-blocking, so that a pipe in its place is refused and not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise UserError(
            f"cannot read the key file {path} ({err.strerror}); it must be a file of this user, "
            "not a link"
        ) from err
    try:
        # Of the open file, not of the name, which could be moved in between.
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            raise UserError(f"{path} is no key file (not a file, or too large); {_MADE_ANEW}")
        if found.st_uid != os.geteuid():
            raise UserError(
                f"key file {path} belongs to user {found.st_uid}, this is user {os.geteuid()}; run "
                "as its owner"
            )
        if found.st_mode & 0o077:
            raise UserError(
                f"others than its owner may use the key file {path} (mode "
                f"{stat.S_IMODE(found.st_mode):04o}); treat its keys as known, or: chmod 600 {path}"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as err:
        raise UserError(
            f"cannot read the key file {path} ({err.strerror}); mend its disk, or {_MADE_ANEW}"
        ) from err
    finally:
        os.close(descriptor)


class Lock:
    """At most one holder of a key file at a time; let go by ``close``, or when collected.

    Two processes with the same share could each answer once for a round, which makes two answers.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock, an empty file beside ``path``, or raises ``UserError``.

        What a killed ``write`` has left beside ``path`` is removed: it holds keys that a rotation
        is to make an end of.
        """
        beside = path.with_name(f".{path.name}.lock")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(beside, flags, 0o600)
        except OSError as err:
            raise UserError(f"cannot make the lock {beside} ({err.strerror})") from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(descriptor)
            raise UserError(
                f"key file {path} is in use by another process or object; stop that one first"
            ) from err
        self._close = weakref.finalize(self, os.close, descriptor)
        # Exactly what ``write`` names: other files' names may begin like this one's.
        part = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * _PART_BYTES}}}\.part")
        try:
            for name in filter(part.fullmatch, os.listdir(path.parent)):
                path.with_name(name).unlink(missing_ok=True)
        except OSError as err:
            self.close()
            raise UserError(
                f"cannot remove {err.filename}, the rest of an interrupted write "
                f"({err.strerror}); remove it, it holds keys"
            ) from err

    def close(self) -> None:
        """Lets go; a second call does nothing."""
        self._close()
