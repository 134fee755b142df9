"""The part of a round that crosses the boundary between clouds: who sent what, and how long."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.sums import SecureSum, collect

OnStage = Callable[[str], None]


@dataclass
class Ledger:
    """What a round has cost so far.

    Attributes:
        sent: bytes by cloud towards the server.
        received: bytes by cloud from the server.
        seconds: measured seconds by stage.
    """

    sent: dict[str, int]
    received: dict[str, int]
    seconds: dict[str, float] = field(
        default_factory=lambda: {"encrypt": 0.0, "add": 0.0, "decrypt": 0.0}
    )

    @classmethod
    def of(cls, names: Sequence[str]) -> "Ledger":
        """Returns a ledger in which no cloud has sent or received anything."""
        return cls(dict.fromkeys(names, 0), dict.fromkeys(names, 0))


class _Metered:
    """An upload that counts its bytes and the time it takes to make them."""

    def __init__(self, make: Callable[[], Iterator[bytes]]) -> None:
        self.bytes = 0
        started = time.perf_counter()
        self._chunks = make()
        self.seconds = time.perf_counter() - started

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        started = time.perf_counter()
        try:
            chunk = next(self._chunks)
        finally:
            self.seconds += time.perf_counter() - started
        self.bytes += len(chunk)
        return chunk


def encrypted_sum(
    secure_sum: SecureSum,
    ints_KxP: jax.Array,
    names: Sequence[str],
    online: Sequence[str],
    round_number: int,
    ledger: Ledger,
    on_stage: OnStage,
) -> NDArray[np.int64]:
    """Each cloud's integers go out in encrypted chunks and are added as these come; the sum opens.

    Clouds that were not sampled send encrypted zeros: who was is not to be seen.

    Args:
        secure_sum: keys and parties.
        ints_KxP: int32, each cloud's message in the order of `names`; further rows are padding.
        names: all clouds.
        online: those that send and can decrypt.
        round_number: of this sum; larger than that of any before.
        ledger: is added to: the time in which chunks are made is "encrypt", the rest of their
            addition "add", everything from the last chunk to the sum "decrypt".
        on_stage: called as encryption and decryption begin.

    Returns:
        int64 [P], the exact sum.
    """
    on_stage("encrypt")
    round_sum = secure_sum.begin(round_number)
    for name in online:
        ints_P = client_ints(ints_KxP, names.index(name))
        started = time.perf_counter()
        upload = _Metered(partial(secure_sum.upload, name, round_number, ints_P))
        round_sum.add(name, upload)
        spent = time.perf_counter() - started
        ledger.seconds["encrypt"] += upload.seconds
        ledger.seconds["add"] += spent - upload.seconds
        ledger.sent[name] += upload.bytes
    on_stage("decrypt")
    started = time.perf_counter()
    result = collect(round_sum, online)
    ledger.seconds["decrypt"] += time.perf_counter() - started
    for name in online:
        ledger.sent[name] += result.bytes_up.get(name, 0)
        ledger.received[name] += result.bytes_down.get(name, 0)
    return result.total_P


def client_ints(ints_KxP: jax.Array, client: int) -> jax.Array:
    """One client's integers on the device that computed them; nothing else is moved."""
    for shard in ints_KxP.addressable_shards:
        first = shard.index[0].start or 0
        if first <= client < first + shard.data.shape[0]:
            return _row(shard.data, jnp.int32(client - first))
    raise IndexError(f"no device holds client {client} of {ints_KxP.shape[0]}")


@jax.jit
def _row(ints_KxP: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ints_KxP, index, keepdims=False)
