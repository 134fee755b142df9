"""The sum without encryption: same integers, same checks, same header; the server sees all."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.sums import BadMessage, SumResult, checked_clients, checked_ints
from fedjax_llm.secure.wire import message, open_message

KIND = "plain"
_NO_KEYS = b""


@dataclass(frozen=True)
class PlainSum:
    """Adds what clients send in the clear.

    Attributes:
        count: integers per message.
        max_abs: bound of every integer's absolute value.
        summands: most clients of one sum.
        minimum_clients: fewest clients of one sum.
    """

    count: int
    max_abs: int
    summands: int
    minimum_clients: int = 1

    def statement(self) -> str:
        """Who sees what."""
        return "no encryption: the server sees every client's update"

    @property
    def _dtype(self) -> np.dtype[np.signedinteger]:
        return np.dtype("<i4") if self.max_abs < 2**31 else np.dtype("<i8")

    def encode_message(self, client: str, round_number: int, ints_P: NDArray[np.integer]) -> bytes:
        """The integers as they are, 4 bytes each (8 beyond 31 bits), behind the header."""
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        body = ints.astype(self._dtype).tobytes()
        return message(KIND, client, round_number, _NO_KEYS, self.count, body)

    def check_alive(self, alive: Sequence[str]) -> None:
        """Nothing is decrypted, so that nobody needs to be there for it."""

    def sum(
        self, messages: Mapping[str, bytes], round_number: int, alive: Sequence[str] = ()
    ) -> SumResult:
        """Adds the messages that arrived; ``alive`` plays no part, nothing is decrypted."""
        checked_clients(list(messages), self.minimum_clients, self.summands)
        start = time.perf_counter()
        total_P = np.zeros(self.count, np.int64)
        for client in sorted(messages):
            body = open_message(KIND, client, round_number, _NO_KEYS, self.count, messages[client])
            if len(body) != self.count * self._dtype.itemsize:
                raise BadMessage(client, "the body has another length than the header says")
            ints = np.frombuffer(body, self._dtype).astype(np.int64)
            if ((ints > self.max_abs) | (ints < -self.max_abs)).any():
                raise BadMessage(client, f"an entry lies beyond the agreed bound {self.max_abs}")
            total_P += ints
        seconds = {"add": time.perf_counter() - start}
        return SumResult(total_P, tuple(sorted(messages)), seconds=seconds)
