"""What every secure sum promises: the interface, its result and its refusals.

A round has three steps. Every client calls ``upload`` and sends the chunks that it yields. The
server calls ``begin``, gives the chunks of each client to ``add``, and takes the total from
``pieces``. Chunks and pieces are small, so that neither side ever holds a message twice.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.fixed_point import OUT_OF_BOUND


class BadMessage(Refused):
    """Bytes that are not the message they should be; ``sender`` names whose they are."""

    def __init__(self, sender: str, reason: str) -> None:
        super().__init__(f"message of {sender!r} refused: {reason}")
        self.sender = sender


class BelowThreshold(Refused):
    """Fewer clouds are alive than decryption takes; nothing was decrypted."""


class WrongSum(Refused):
    """The decrypted canary or range is wrong: the result is garbage and is not returned."""


class NoAnswer(Refused):
    """A party did not answer; ``cloud`` names it. The round tries without it."""

    def __init__(self, cloud: str, reason: str = "it cannot be reached") -> None:
        super().__init__(f"no answer from {cloud!r}: {reason}")
        self.cloud = cloud


@dataclass
class Costs:
    """What a round has cost so far; a ``RoundSum`` fills it in.

    Attributes:
        bytes_up: per party that helps to decrypt (a cloud that holds a key share, or a client of
            a masked sum), what it sent for this. Uploads are not included.
        bytes_down: per such party, what it received for this.
        seconds: wall-clock seconds at the server per stage: "add", "decrypt" (partial decryptions
            or the recovery of masks) and "unmask". A stage that a mode does not have is absent.
    """

    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time that the body takes to ``seconds[stage]``, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@dataclass(frozen=True)
class SumResult:
    """One round's sum and what it cost.

    Attributes:
        total_P: int64, the exact sum over the participants.
        participants: the clients whose messages were added, sorted.
        bytes_up: as in ``Costs``.
        bytes_down: as in ``Costs``.
        seconds: as in ``Costs``.
    """

    total_P: NDArray[np.int64]
    participants: tuple[str, ...]
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Opening(NamedTuple):
    """What opening a total takes.

    Attributes:
        parties: that have to help; 0 where the server reads the total.
        bytes_down: each receives, but for names, digests and signatures (a few hundred bytes each).
        bytes_up: each sends, the same.
    """

    parties: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class RoundSum(Protocol):
    """The server's side of one round."""

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads have been added, sorted."""

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds one client's upload, all of it or nothing.

        Args:
            client: whose upload it is, as the connection says.
            upload: the chunks in order; consumed one by one. What it raises is passed on.

        Raises:
            BadMessage: a chunk is damaged, missing, repeated, out of order, of another round, run
                or client; or it is the client's second upload. The sum is as it was.
            Refused: the sum is full, or its total has been asked for. The sum is as it was. Or an
                earlier call broke off while it added (a disk, Ctrl-C): half an upload may be in
                the sum, so that the round refuses everything from then on.
        """

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total over ``participants`` as consecutive pieces, ``count`` integers in all.

        Nobody may be added any more. Use nothing of it before the last piece has come: a canary
        may fail late. After BelowThreshold it may be asked for again. A total that was given is
        not given twice, or is the same.

        Args:
            alive: the parties that can help to decrypt now.

        Raises:
            BelowThreshold: too few of them are alive.
            WrongSum: the decryption is garbage.
            Refused: fewer participants than ``minimum_clients`` (more may be added still), a
                total of this or a later round was taken before, or an ``add`` broke off.
        """

    @property
    def costs(self) -> Costs:
        """What the round has cost so far."""


class SecureSum(Protocol):
    """Adds integer vectors of clients. Sums of different kinds give bit-identical totals.

    A round number serves for one total only, and round numbers increase.
    """

    @property
    def kind(self) -> str:
        """One of ``wire.KINDS``."""

    @property
    def count(self) -> int:
        """Integers per client."""

    @property
    def max_abs(self) -> int:
        """Bound of every integer's absolute value (``FixedPoint.max_int``)."""

    @property
    def summands(self) -> int:
        """Most clients of one sum."""

    @property
    def minimum_clients(self) -> int:
        """Fewest clients of one sum."""

    def statement(self) -> str:
        """One line on who can decrypt what; printed when a run starts."""

    def check_alive(self, alive: Sequence[str]) -> None:
        """Raises BelowThreshold if these parties could not decrypt; ``pieces`` checks it again."""

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The chunks that leave the client, made one by one as they are asked for.

        Args:
            client: who sends.
            round_number: for which sum, in [0, 2^63).
            ints_P: a numpy array of any integer type, or a jax array of int32.

        Raises:
            Refused: wrong length, not integers, or an entry beyond ``max_abs``. It is raised by
                the call itself, before the first chunk can be taken.
        """

    def upload_bytes(self, client: str) -> int:
        """Exact length of all chunks of one upload of this client."""

    @property
    def opening(self) -> Opening:
        """What opening one total takes of those who help; for plans, the ledger counts it."""

    def begin(self, round_number: int) -> RoundSum:
        """The server's side of this round.

        Raises:
            Refused: the number is not above all whose total was taken from this object.
        """


def collect(round_sum: RoundSum, alive: Sequence[str] = ()) -> SumResult:
    """The whole total at once, for those who have room for it (8 bytes per integer).

    Raises:
        BelowThreshold, WrongSum, Refused: as ``RoundSum.pieces``.
    """
    pieces = list(round_sum.pieces(alive))
    costs = round_sum.costs
    total_P = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return SumResult(
        total_P,
        round_sum.participants,
        dict(costs.bytes_up),
        dict(costs.bytes_down),
        dict(costs.seconds),
    )


def sum_uploads(
    secure_sum: SecureSum,
    uploads: Mapping[str, Iterable[bytes]],
    round_number: int,
    alive: Sequence[str] = (),
) -> SumResult:
    """One round from its uploads: whoever dropped out is simply absent.

    Raises:
        BadMessage, BelowThreshold, WrongSum, Refused: as ``RoundSum``; the first bad upload ends
            it. Use ``begin`` and ``add`` to go on without the client that an error names.
    """
    round_sum = secure_sum.begin(round_number)
    for client in sorted(uploads):
        round_sum.add(client, uploads[client])
    return collect(round_sum, alive)


class RoundNumbers:
    """Remembers which round's total was taken last, since two totals of a round differ by a client.

    | event | result |
    |---|---|
    | ``check`` of a number above the last taken one | passes, any number of times |
    | ``check`` or ``take`` of the last taken number or one below | Refused |
    | a round that fails before ``take`` | its number may be used again |
    | not an integer, negative, 2^63 or more | Refused |
    """

    def __init__(self) -> None:
        self._last = -1

    def check(self, round_number: int) -> None:
        """Raises Refused unless a total of this round may still be taken."""
        checked_round(round_number)
        if round_number <= self._last:
            raise Refused(
                f"round {round_number} is over: the total of round {self._last} has been taken; "
                "use a larger round number"
            )

    def take(self, round_number: int) -> None:
        """Records that this round's total is about to be known."""
        self.check(round_number)
        self._last = round_number


def checked_plan(count: int, max_abs: int, summands: int, minimum_clients: int) -> None:
    """Raises UserError unless a sum of these sizes is possible and fits int64."""
    if min(count, max_abs, summands, minimum_clients) < 1:
        raise UserError(
            "count, max_abs, summands and minimum_clients must be at least 1, got "
            f"{count}, {max_abs}, {summands} and {minimum_clients}"
        )
    if minimum_clients > summands:
        raise UserError(
            f"a sum of at most {summands} clients never has {minimum_clients}; "
            "lower minimum_clients or raise summands"
        )
    if summands * max_abs >= 2**63:
        raise UserError(
            f"{summands} summands of up to {max_abs} overflow int64; use fewer of either"
        )


def checked_round(round_number: int) -> int:
    """The number of a round, or a refusal if the wire cannot carry it."""
    if not isinstance(round_number, int | np.integer) or not 0 <= round_number < 2**63:
        raise Refused(f"a round number must be in [0, 2^63), got {round_number}")
    return int(round_number)


def checked_ints(client: str, ints_P: Any, count: int, max_abs: int) -> NDArray[np.integer]:
    """The client's vector in its own integer type, or a refusal before anything is sent.

    A numpy array, and a jax array on the CPU, is not copied. Widen it piece by piece, for
    arithmetic in int8 wraps.

    | entry | result |
    |---|---|
    | within [-max_abs, max_abs] | passes |
    | beyond, also ``OUT_OF_BOUND``, the smallest integer of a type, 2^63 and more | Refused |
    | floats, complex, bool, objects, another shape | Refused |

    Args:
        client: named in the message.
        ints_P: [count], any signed or unsigned integer type.
        count: expected length.
        max_abs: bound of the absolute value.

    Raises:
        Refused: naming the client, and the first entry beyond the bound.
    """
    array = np.asarray(ints_P)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise Refused(
            f"client {client!r} must send {count} integers, got shape {array.shape} of "
            f"{array.dtype}; encode with FixedPoint first"
        )
    # Python's integers: in numpy's, -min of a type is min again.
    if int(array.max(initial=0)) > max_abs or int(array.min(initial=0)) < -max_abs:
        where = int(np.argmax((array > max_abs) | (array < -max_abs)))
        found = int(array[where])
        before = ": it was not finite or out of bounds when it was encoded"
        raise Refused(
            f"client {client!r}: entry {where} is {found}, beyond the agreed bound {max_abs}"
            f"{before if found == OUT_OF_BOUND else ''}; lower the clip norm or raise the bound"
        )
    return array


def checked_clients(clients: Sequence[str], minimum: int, summands: int) -> None:
    """Refuses a sum so small that it is one client's message, or larger than was planned for."""
    if len(clients) < minimum:
        raise Refused(
            f"a sum needs at least {minimum} clients, {len(clients)} sent a message "
            f"({', '.join(sorted(clients)) or 'none'}); wait for more or skip the round"
        )
    if len(clients) > summands:
        raise Refused(
            f"{len(clients)} clients sent a message, the sum is exact up to {summands}; "
            "set up the sum for more summands"
        )
