"""The part of a round that crosses the boundary between clouds: who sent what, and how long."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds.site import Opening, Size
from fedjax_llm.errors import UserError
from fedjax_llm.federation import processes
from fedjax_llm.federation.assembly import Assembly
from fedjax_llm.federation.message import MessageCodec, WeightCodec
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.sums import HiddenMode, Plain, Selective, SumMode
from fedjax_llm.secure.sums import SecureSum, checked_clients, collect

OnStage = Callable[[str], None]


Codec = MessageCodec | type[WeightCodec]


class HiddenSums:
    """The open secure sums of a federation: one for each length of message and group of clouds.

    Args:
        mode: which kind.
        clouds: all that send.
        groups: of each cloud, where the sums of groups stay apart; one group of all if None.
        clients: most clients of a cloud.
        codecs: of all the messages of a round.

    Raises:
        UserError, Refused: as `sums.SumMode.open`; a selection for rounds of several lengths.
    """

    def __init__(
        self,
        mode: HiddenMode,
        clouds: Sequence[str],
        groups: Sequence[int] | None,
        clients: int,
        codecs: Iterable[Codec],
    ) -> None:
        self._clouds = tuple(clouds)
        members = groups or (0,) * len(clouds)
        self._groups = tuple(
            tuple(name for name, own in zip(clouds, members, strict=True) if own == group)
            for group in range(max(members) + 1)
        )
        self._apart = groups is not None
        self._clients = clients
        wanted = dict.fromkeys(self._length(codec) for codec in codecs)
        if isinstance(mode, Selective) and len(wanted) > 1:
            raise UserError(
                "selective encryption needs a rule that sends the same parameters in every sum; "
                "encrypt everything, or choose another rule"
            )
        self._open = {
            length: tuple(mode.open(group, *length) for group in self._groups) for length in wanted
        }

    def _length(self, codec: Codec) -> tuple[int, int]:
        """Integers of what a cloud sends, the sum of its clients, and their bound."""
        count, max_int = codec.length
        return count, self._clients * max_int

    def upload_bytes(self, codec: Codec, cloud: str) -> int:
        """Exact length of one upload of this cloud."""
        return next(
            secure_sum.upload_bytes(cloud)
            for group, secure_sum in zip(self._groups, self._open[self._length(codec)], strict=True)
            if cloud in group
        )

    def opening(self) -> Opening:
        """What the clouds do to open the sum of a step; groups open theirs side by side."""
        found = self.first.opening
        return Opening(found.parties, Size(found.bytes_down, found.bytes_up))

    @property
    def first(self) -> SecureSum:
        """One of them; all hide alike."""
        return next(iter(self._open.values()))[0]

    def statement(self) -> str:
        """Who can decrypt what."""
        words = self.first.statement()
        if self._apart:
            shown = "; ".join(", ".join(group) for group in self._groups)
            words = f"sums of {len(self._groups)} groups are opened apart ({shown}). " + words
        return words

    def check(self, senders: Sequence[str], online: Sequence[str]) -> None:
        """Refuses before anybody trains in vain what the sums would refuse after.

        Args:
            senders: whose messages a sum takes.
            online: who can help to open it.
        """
        for group, secure_sum in zip(self._groups, next(iter(self._open.values())), strict=True):
            secure_sum.check_alive([name for name in group if name in online])
            sending = [name for name in group if name in senders]
            checked_clients(sending, secure_sum.minimum_clients, secure_sum.summands)

    def total(
        self,
        codec: Codec,
        ints_CxP: jax.Array,
        senders: Sequence[str],
        online: Sequence[str],
        number: int,
        ledger: "Ledger",
        on_stage: OnStage,
    ) -> NDArray[np.int64]:
        """The sum over all clouds [P], or that of each group [G, P].

        Keys and masks come from the operating system: of several processes the first one encrypts
        and opens, and tells the others the sum. Its ledger alone has the bytes and the seconds.

        Args:
            codec: of the messages.
            ints_CxP: int32, each cloud's message in the order of the clouds.
            senders: those whose messages are added.
            online: those that can help to open the sum.
            number: of the sum, above that of any before.
            ledger: is added to.
            on_stage: see `encrypted_sum`.
        """
        if not processes.leads():
            count = codec.length[0]
            shape = (len(self._groups), count) if self._apart else (count,)
            told: NDArray[np.int64] = processes.from_first(np.zeros(shape, np.int64))
            return told
        totals = [
            encrypted_sum(
                secure_sum,
                ints_CxP,
                self._clouds,
                [name for name in group if name in senders],
                [name for name in group if name in online],
                number,
                ledger,
                on_stage,
            )
            for group, secure_sum in zip(self._groups, self._open[self._length(codec)], strict=True)
        ]
        opened: NDArray[np.int64] = processes.from_first(
            np.stack(totals) if self._apart else totals[0]
        )
        return opened


def hidden_sums(mode: SumMode, parts: Assembly, roster: Roster) -> HiddenSums | None:
    """Opens the sums between the clouds of a federation; None for a sum on the devices.

    Args:
        mode: which kind.
        parts: recipe, codecs and groups.
        roster: the clients.

    Raises:
        UserError, Refused: as `HiddenSums`.
    """
    if isinstance(mode, Plain):
        return None
    wanted: list[Codec] = [codec for codecs in parts.codecs for codec in codecs]
    if parts.recipe.sums_weights:
        wanted.append(WeightCodec)
    most = max(len(roster.members(cloud)) for cloud in range(len(roster.clouds)))
    return HiddenSums(mode, roster.names, parts.groups, most, wanted)


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

    def add(self, sent: Sequence[int] = (), received: Sequence[int] = ()) -> None:
        """Adds bytes of each cloud, in the order of the names."""
        for total, bytes_ in ((self.sent, sent), (self.received, received)):
            for name, more in zip(total, bytes_, strict=False):
                total[name] += more


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
    senders: Sequence[str],
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
        senders: those that send.
        online: those that can decrypt.
        round_number: of this sum; larger than that of any before.
        ledger: is added to: the time in which chunks are made is "encrypt", the rest of their
            addition "add", everything from the last chunk to the sum "decrypt".
        on_stage: called as encryption and decryption begin.

    Returns:
        int64 [P], the exact sum.
    """
    on_stage("encrypt")
    round_sum = secure_sum.begin(round_number)
    for name in senders:
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
