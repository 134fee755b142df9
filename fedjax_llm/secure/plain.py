"""The sum without encryption: same integers, same checks, same chunks; the server sees all."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels, SimulatedChannels
from fedjax_llm.secure.intake import Intake
from fedjax_llm.secure.sums import (
    BadMessage,
    Costs,
    Opening,
    RoundNumbers,
    checked_clients,
    checked_ints,
    checked_plan,
)
from fedjax_llm.secure.wire import NO_EPOCH, Header, UploadWriter, parameters_digest, upload_bytes

_CHUNK = 2**18


class PlainSum:
    """Adds what clients send in the clear, in the narrowest integers of 2, 4 or 8 bytes.

    Chunks carry a MAC, so that nobody but the client and the server can change them; nothing hides
    them. Uploads are chunks of 2^18 integers, two's complement, little-endian.
    """

    kind = "plain"

    def __init__(
        self,
        count: int,
        max_abs: int,
        summands: int,
        minimum_clients: int = 1,
        channels: Channels | None = None,
        named: bytes = b"",
    ) -> None:
        """Fixes the sizes.

        Args:
            count: integers per client.
            max_abs: bound of every integer's absolute value.
            summands: most clients of one sum.
            minimum_clients: fewest clients of one sum.
            channels: MAC keys; None simulates all parties in this process.
            named: what else client and server must agree on, such as a digest of what the
                integers stand for. Uploads that name something else are refused.

        Raises:
            UserError: a size is below 1, or the sum could overflow 63 bits.
        """
        checked_plan(count, max_abs, summands, minimum_clients)
        self.count, self.max_abs, self.summands = count, max_abs, summands
        self.minimum_clients = minimum_clients
        self.channels = SimulatedChannels() if channels is None else channels
        self.numbers = RoundNumbers()
        self.dtype = _narrowest(max_abs)
        self.starts = range(0, count, _CHUNK)
        self.payload_bytes = tuple(
            min(_CHUNK, count - at) * self.dtype.itemsize for at in self.starts
        )
        self._parameters = parameters_digest(self.kind, count, max_abs, summands, named)

    def statement(self) -> str:
        """Who sees what."""
        return "no encryption: the server sees every client's update"

    def check_alive(self, alive: Sequence[str]) -> None:
        """Nothing is decrypted, so that nobody needs to be there for it."""

    def header(self, client: str, round_number: int) -> Header:
        """What a client's chunks say of themselves."""
        return Header(self.kind, self._parameters, NO_EPOCH, round_number, self.count, client)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The integers as they are; see ``SecureSum``."""
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        header, key = self.header(client, round_number), self.channels.key(client)
        writer = UploadWriter(header, key, len(self.starts))
        return (writer.write(ints[at : at + _CHUNK].astype(self.dtype)) for at in self.starts)

    def upload_bytes(self, client: str) -> int:
        """Bytes of one upload."""
        return upload_bytes(client, self.payload_bytes)

    @property
    def opening(self) -> Opening:
        """Nobody has to help."""
        return Opening()

    def begin(self, round_number: int) -> "PlainRound":
        """The server's side of this round."""
        self.numbers.check(round_number)
        return PlainRound(self, round_number)


class PlainRound:
    """The server of one round: one accumulator, whatever the number of clients."""

    def __init__(self, plan: PlainSum, round_number: int) -> None:
        """Nothing is added yet."""
        self._plan, self._round = plan, round_number
        self._costs = Costs()
        self._intake = Intake(
            lambda client: plan.header(client, round_number),
            plan.channels,
            plan.payload_bytes,
            plan.summands,
            costs=self._costs,
        )
        dtype = np.int32 if plan.summands * plan.max_abs < 2**31 else np.int64
        self._total_P: NDArray[np.signedinteger] = np.zeros(plan.count, dtype)
        self._taken = False

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads are in the sum, sorted."""
        return self._intake.participants

    @property
    def costs(self) -> Costs:
        """Seconds of "add"; nobody else takes part."""
        return self._costs

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds one client's upload, all of it or nothing; see ``RoundSum``."""
        plan = self._plan

        def check(chunk: int, payload: memoryview) -> None:
            ints = np.frombuffer(payload, plan.dtype)
            if int(ints.max()) > plan.max_abs or int(ints.min()) < -plan.max_abs:
                raise BadMessage(client, f"an entry lies beyond the agreed bound {plan.max_abs}")

        with self._intake.adding(client, upload, check) as received:
            for at, payload in zip(plan.starts, received.payloads(), strict=True):
                self._total_P[at : at + _CHUNK] += np.frombuffer(payload, plan.dtype)

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total, 2^18 integers at a time; ``alive`` plays no part."""
        self._intake.require_whole()
        if self._taken:
            raise Refused(f"the total of round {self._round} has been taken already")
        checked_clients(self.participants, self._plan.minimum_clients, self._plan.summands)
        self._plan.numbers.take(self._round)
        self._intake.close()
        self._taken = True
        for at in self._plan.starts:
            yield self._total_P[at : at + _CHUNK].astype(np.int64)


def _narrowest(max_abs: int) -> np.dtype[np.signedinteger]:
    for code in ("<i2", "<i4"):
        if max_abs <= np.iinfo(code).max:
            return np.dtype(code)
    return np.dtype("<i8")
