"""Selective encryption: some coordinates of a message go through a sum that hides, the rest not.

This is the "hybrid encrypted and plaintext aggregation" of arXiv 2503.12226. What stays in the
clear is read by the server, client by client. Whether that may be is not for this module to say: a
federation allows it only where every client has noised its own update (``federation.promises``).
Which coordinates are encrypted is for ``selection``.

Notation: P coordinates of a message.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.selection import Selection, percent
from fedjax_llm.secure.sums import Costs, Opening, RoundSum, SecureSum, checked_ints, collect


class SelectiveSum:
    """One sum out of two: a hiding one for the selected coordinates, a plain one for the rest.

    Formal guarantee. The total is that of either kind of sum, bit for bit. The selected coordinates
    have the guarantee of ``hidden``, the others none: the server reads them for every client. An
    upload is added as a whole or not at all. The parameters of the plain part, which comes first,
    name the selection: an upload that was made for another one, though of the same sizes, is
    refused. Each part carries its own MAC; the two parts of one upload are not bound to each other
    beyond client, round and parameters, so that a client that sends two uploads in a round may
    find one part of each added.

    | upload | result |
    |---|---|
    | a bad or missing chunk in either part | BadMessage, neither part is added |
    | the two parts in the other order | BadMessage |
    | for another selection | BadMessage |
    | one whose adding broke off between the parts, or in one of them | the round refuses all else |
    """

    def __init__(
        self, hidden: SecureSum, selection: Selection, channels: Channels | None = None
    ) -> None:
        """Puts a plain sum for the rest beside ``hidden``.

        Args:
            hidden: a sum of as many integers as the selection encrypts.
            selection: which coordinates those are.
            channels: MAC keys of the plain part, as a rule the same that ``hidden`` has; None
                simulates all parties in this process.
        """
        if hidden.count != selection.encrypted:
            raise ValueError(f"{hidden.count} integers are summed, {selection.encrypted} selected")
        self._hidden, self._selection = hidden, selection
        self._clear = PlainSum(
            selection.mask_P.size - selection.encrypted,
            hidden.max_abs,
            hidden.summands,
            hidden.minimum_clients,
            channels,
            selection.digest,
        )

    @property
    def kind(self) -> str:
        """That of the hiding sum."""
        return self._hidden.kind

    @property
    def count(self) -> int:
        """P."""
        return self._selection.mask_P.size

    @property
    def max_abs(self) -> int:
        """Bound of every integer's absolute value."""
        return self._hidden.max_abs

    @property
    def summands(self) -> int:
        """Most clients of one sum."""
        return self._hidden.summands

    @property
    def minimum_clients(self) -> int:
        """Fewest clients of one sum."""
        return self._hidden.minimum_clients

    def statement(self) -> str:
        """Who can decrypt what, which part that is about, and what the rest leaves open."""
        chosen = self._selection
        return (
            f"{self._hidden.statement()}. Selective: only {percent(chosen.fraction)} of the "
            f"parameters ({chosen.encrypted:,} of {self.count:,}; {chosen.reason}) are encrypted. "
            f"In the clear, read by the server for every client: {chosen.in_the_clear()}"
        )

    def check_alive(self, alive: Sequence[str]) -> None:
        """Raises BelowThreshold if these parties could not decrypt the encrypted part."""
        self._hidden.check_alive(alive)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The chunks of the plain part, then those of the encrypted one."""
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        mask_P = self._selection.mask_P
        return itertools.chain(
            self._clear.upload(client, round_number, ints[~mask_P]),
            self._hidden.upload(client, round_number, ints[mask_P]),
        )

    def upload_bytes(self, client: str) -> int:
        """Exact length of one upload."""
        return self._clear.upload_bytes(client) + self._hidden.upload_bytes(client)

    @property
    def opening(self) -> Opening:
        """Of the hidden part."""
        return self._hidden.opening

    def begin(self, round_number: int) -> "SelectiveRound":
        """The server's side of this round."""
        return SelectiveRound(
            round_number,
            self._hidden.begin(round_number),
            self._clear.begin(round_number),
            len(self._clear.payload_bytes),
            self._selection.mask_P,
        )


class SelectiveRound:
    """The server of one round of a ``SelectiveSum``."""

    def __init__(
        self,
        round_number: int,
        hidden: RoundSum,
        clear: RoundSum,
        clear_chunks: int,
        mask_P: NDArray[np.bool_],
    ) -> None:
        """Nothing is added yet."""
        self._round, self._hidden, self._clear = round_number, hidden, clear
        self._clear_chunks, self._mask_P = clear_chunks, mask_P

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads have been added, sorted."""
        return self._hidden.participants

    @property
    def costs(self) -> Costs:
        """Of both parts."""
        hidden, clear = self._hidden.costs, self._clear.costs
        stages = {**hidden.seconds, **clear.seconds}
        seconds = {s: hidden.seconds.get(s, 0.0) + clear.seconds.get(s, 0.0) for s in stages}
        return Costs(dict(hidden.bytes_up), dict(hidden.bytes_down), seconds)

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds both parts or neither; see ``RoundSum``."""
        self._require_same_participants()
        chunks = iter(upload)

        def clear() -> Iterator[bytes]:
            taken = 0
            for chunk in itertools.islice(chunks, self._clear_chunks):
                taken += 1
                yield chunk
            # The plain sum has verified its last chunk and asks for the end: nothing that a client
            # sends can fail in it any more. What the other sum raises here passes through it and
            # leaves it as it was. If its disk fails after that, the participants differ.
            if taken == self._clear_chunks:
                self._hidden.add(client, chunks)

        self._clear.add(client, clear())

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total, one piece for each of the encrypted part with what lies between and before."""
        self._require_same_participants()
        clear_P: NDArray[np.int64] | None = None
        start = clear_start = found = 0
        encrypted = int(np.count_nonzero(self._mask_P))
        places = np.flatnonzero(self._mask_P)
        for piece in self._hidden.pieces(alive):
            if not piece.size:
                continue
            if clear_P is None:
                # Not before the other sum is sure to open: this one opens once only.
                clear_P = collect(self._clear).total_P
            found += piece.size
            stop = self._mask_P.size if found == encrypted else int(places[found - 1]) + 1
            mask = self._mask_P[start:stop]
            out = np.empty(stop - start, np.int64)
            out[mask] = piece
            clear_stop = clear_start + mask.size - piece.size
            out[~mask] = clear_P[clear_start:clear_stop]
            start, clear_start = stop, clear_stop
            yield out

    def _require_same_participants(self) -> None:
        for client in set(self._hidden.participants) ^ set(self._clear.participants):
            raise Refused(
                f"round {self._round} broke off while adding {client!r}: one part of its upload is "
                "in the sum, the other is not; start it anew"
            )
