"""The server's intake of uploads: all chunks verified before the first one is used.

Adding is all or nothing, though an upload comes in many chunks and its last one may be bad. So
the payloads wait, in memory up to a budget and beyond that in a temporary file that no name leads
to, until the whole upload has passed. Where adding itself breaks off, nobody can say what the sum
holds, and the round ends.
"""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.sums import BadMessage, Costs
from fedjax_llm.secure.wire import Header, read_chunk

# Beyond it, writing to a disk and reading back takes longer than the MAC and the sum together.
MEMORY_BUDGET = 64 * 2**20


class Upload:
    """The payloads of one verified upload, to be read as often as needed until ``close``."""

    def __init__(self, memory_budget: int, folder: Path | None) -> None:
        """An upload without chunks.

        Args:
            memory_budget: bytes of payload to keep in memory.
            folder: where the rest goes; None is the system's folder for temporary files.
        """
        self._budget, self._folder = memory_budget, folder
        self._kept: list[memoryview] = []
        self._spilled: list[int] = []
        self._file: io.FileIO | None = None

    def append(self, payload: memoryview) -> None:
        """Takes over the next payload.

        Raises:
            UserError: there is no room on the disk.
        """
        if self._file is None and payload.nbytes <= self._budget:
            self._budget -= payload.nbytes
            self._kept.append(payload)
            return
        try:
            if self._file is None:
                # Anonymous, or unlinked at once: it goes when the process does, however it ends.
                made = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                self._file = made
            left = payload
            while left:
                left = left[self._file.write(left) :]
        except OSError as err:
            raise UserError(
                f"an upload finds no room in {self._where} ({err.strerror or err}); free some, or "
                "allow more memory for uploads"
            ) from err
        self._spilled.append(payload.nbytes)

    def payloads(self) -> Iterator[memoryview]:
        """The payloads in order.

        Raises:
            UserError: the disk does not give back what it took.
        """
        yield from self._kept
        if self._file is None:
            return
        at = 0
        for size in self._spilled:
            payload = memoryview(bytearray(size))
            self._read(self._file, at, payload)
            yield payload
            at += size

    def _read(self, file: io.FileIO, at: int, payload: memoryview) -> None:
        try:
            file.seek(at)
            left = payload
            # A read may give less than it was asked for; nothing at all is the end of the file.
            while left:
                found = file.readinto(left)
                if not found:
                    raise OSError(f"{len(left)} bytes are missing")
                left = left[found:]
        except OSError as err:
            raise UserError(
                f"an upload cannot be read back from {self._where} ({err.strerror or err}); check "
                "the disk, or allow more memory for uploads"
            ) from err

    @property
    def _where(self) -> str:
        return str(self._folder or tempfile.gettempdir())

    def close(self) -> None:
        """Frees memory and disk."""
        self._kept.clear()
        self._spilled.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


class Intake:
    """Who has sent what in one round.

    Formal guarantee. ``receive`` returns only payloads whose every byte carries the client's MAC
    for this round, parameters and keys, in order and complete; for the probability of a forgery
    see ``wire.UploadWriter``. No client is accepted twice, no more clients than ``summands``, and
    none after ``close``. As long as ``require_whole`` passes, what was added in the bodies of
    ``adding`` is the uploads of ``participants``, whole, and nothing else. An upload may lead to
    other calls while its chunks are awaited; apart from that, calls must not overlap in time.

    | upload | result |
    |---|---|
    | ends early, goes on too long, or holds anything but the expected chunk | BadMessage |
    | raises | its own error is passed on |
    | of a client that was accepted before | BadMessage |
    | of one client too many, or after ``close`` | Refused |
    | of a client whose upload was refused or broke off | is heard again |
    | while which another one breaks ``adding`` off | Refused |

    In all cases but a return, nothing is kept of it. The body of ``adding`` is another matter: if
    it ends with an error, whichever (a disk, Ctrl-C), half an upload may be in the sum. From then
    on this round refuses everything.
    """

    def __init__(
        self,
        header_for: Callable[[str], Header],
        channels: Channels,
        payload_bytes: Sequence[int],
        summands: int,
        memory_budget: int = MEMORY_BUDGET,
        folder: Path | None = None,
        costs: Costs | None = None,
    ) -> None:
        """Nobody has sent anything.

        Args:
            header_for: what a client's chunks must say of themselves; may refuse the client.
            channels: the server's side of the clients' channels.
            payload_bytes: length of every chunk's payload.
            summands: most clients of the sum.
            memory_budget: bytes of one upload to hold in memory before its end.
            folder: for what is beyond; None is the system's folder for temporary files.
            costs: time spent here is added to its stage "add". Time that passes while a chunk is
                awaited is not.
        """
        self._header_for, self._channels = header_for, channels
        self._payload_bytes, self._summands = tuple(payload_bytes), summands
        self._memory_budget, self._folder = memory_budget, folder
        self._costs = Costs() if costs is None else costs
        self._accepted: set[str] = set()
        self._closed = False
        self._broke_off = ""  # what happened, once it has

    @property
    def participants(self) -> tuple[str, ...]:
        """Who has been accepted, sorted."""
        return tuple(sorted(self._accepted))

    def receive(
        self,
        client: str,
        upload: Iterable[bytes],
        check: Callable[[int, memoryview], None] | None = None,
    ) -> Upload:
        """A verified upload, to be closed by the caller; ``adding`` does so.

        Args:
            client: whose upload it is, as the connection says.
            upload: its chunks, consumed one by one.
            check: is given the number and the payload of every chunk that has passed, and raises
                BadMessage if the content cannot be.

        Raises:
            BadMessage, Refused: see the table.
            UserError: there is no room on the disk.
        """
        self._may_send(client)
        received = Upload(self._memory_budget, self._folder)
        try:
            self._fill(received, client, upload, check)
            # Again, since the iterable may have led to other calls.
            self._may_send(client)
        except BaseException:
            received.close()
            raise
        return received

    @contextmanager
    def adding(
        self,
        client: str,
        upload: Iterable[bytes],
        check: Callable[[int, memoryview], None] | None = None,
    ) -> Iterator[Upload]:
        """A verified upload for the body to add to the sum: ``with intake.adding(...) as upload``.

        The client counts as accepted when the body ends. The round is marked as broken before the
        body and unmarked after it, not marked when an error is seen: an interruption may come
        between any two steps.

        Args:
            client: as for ``receive``.
            upload: as for ``receive``.
            check: as for ``receive``.

        Raises:
            BadMessage, Refused, UserError: as ``receive``. The sum is as it was.
        """
        with self.receive(client, upload, check) as received, self._costs.timed("add"):
            number = self._header_for(client).round_number
            self._broke_off = f"round {number} broke off while adding {client!r}"
            yield received
            self._accepted.add(client)
            self._broke_off = ""

    def require_whole(self) -> None:
        """Raises Refused once ``adding`` has broken off. Check it before any use of the sum."""
        if self._broke_off:
            raise Refused(f"{self._broke_off}; start it anew")

    def close(self) -> None:
        """Nobody may send any more: the total has been asked for."""
        self._closed = True

    def _fill(
        self,
        received: Upload,
        client: str,
        upload: Iterable[bytes],
        check: Callable[[int, memoryview], None] | None,
    ) -> None:
        expected, key = self._header_for(client), self._channels.key(client)
        chunks, seen = len(self._payload_bytes), 0
        upload_id: bytes | None = None
        for data in upload:
            with self._costs.timed("add"):
                if seen == chunks:
                    raise BadMessage(client, f"it goes on after its {chunks} chunks")
                size = self._payload_bytes[seen]
                payload, upload_id = read_chunk(expected, key, upload_id, seen, chunks, size, data)
                if check is not None:
                    check(seen, payload)
                received.append(payload)
            seen += 1
        if seen < chunks:
            raise BadMessage(client, f"it ended after {seen} of {chunks} chunks")

    def _may_send(self, client: str) -> None:
        self.require_whole()
        if client in self._accepted:
            raise BadMessage(client, "a second upload in this round")
        if self._closed:
            raise Refused(
                f"client {client!r} is too late: the total of {len(self._accepted)} clients has "
                "been asked for; it takes part in the next round"
            )
        if len(self._accepted) >= self._summands:
            raise Refused(
                f"client {client!r} is one too many: the sum is exact up to {self._summands} "
                "clients; set up the sum for more summands"
            )
