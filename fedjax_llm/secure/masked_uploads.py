"""The sum of masked uploads: added as they come, and unmasked at the end.

There is one accumulator of P words of 4 or 8 bytes, however many clients. All arithmetic is modulo
the word, of which 2^m is a divisor, so that nothing has to be reduced in between.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.intake import Intake
from fedjax_llm.secure.masked_layout import Layout, Words, add_packed
from fedjax_llm.secure.masked_masks import Stream, add_streams
from fedjax_llm.secure.masked_parties import OpenRounds
from fedjax_llm.secure.sums import Costs, checked_clients
from fedjax_llm.secure.wire import Header


class MaskedRound:
    """The ``RoundSum`` of masked uploads: one accumulator of P words, however many clients."""

    def __init__(
        self,
        layout: Layout,
        minimum_clients: int,
        rounds: OpenRounds,
        round_number: int,
        header_for: Callable[[str], Header],
        channels: Channels,
    ) -> None:
        """A sum of nobody.

        Args:
            layout: of the sum.
            minimum_clients: fewest clients of a sum.
            rounds: who can take the masks away.
            round_number: of this sum.
            header_for: what a client's chunks must say of themselves; refuses strangers.
            channels: the server's side of the clients' channels.
        """
        self._layout, self._minimum_clients = layout, minimum_clients
        self._rounds, self._round = rounds, round_number
        self._costs = Costs()
        self._intake = Intake(
            header_for, channels, layout.payload_bytes, layout.summands, costs=self._costs
        )
        self._taken = False
        self._sums: list[Words] = []

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads have been added, sorted."""
        return self._intake.participants

    @property
    def costs(self) -> Costs:
        """What the round has cost so far."""
        return self._costs

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds one client's upload, all of it or nothing; see ``RoundSum.add``."""
        with self._intake.adding(client, upload) as received:
            layout = self._layout
            if not self._sums:
                self._sums = [
                    np.zeros(layout.elements(chunk), layout.word) for chunk in range(layout.chunks)
                ]
            for words, payload in zip(self._sums, received.payloads(), strict=True):
                add_packed(words, payload, layout.bits)

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total in pieces of up to 2^18 - 1 integers; see ``RoundSum.pieces``.

        Args:
            alive: the clients that can still reveal shares. Those whose uploads are not in the sum
                may help.

        Raises:
            BelowThreshold: fewer than t of them. Nobody has revealed anything that another try
                with the same uploads could not repeat.
            WrongSum: a client's masks were not those that it had agreed on.
            Refused: too few participants, or the total was taken before.
        """
        self._intake.require_whole()
        if self._taken:
            raise Refused(f"the total of round {self._round} was taken before")
        checked_clients(self.participants, self._minimum_clients, self._layout.summands)
        self._rounds.living(alive)
        self._intake.close()
        server = self._rounds.parties(self._round).server
        with self._costs.timed("decrypt"):
            try:
                streams = self._rounds.recover(self._round, self.participants, alive)
            finally:
                self._costs.bytes_up = dict(server.bytes_up)
                self._costs.bytes_down = dict(server.bytes_down)
        self._taken = True
        return self._unmasked(streams)

    def _unmasked(self, streams: list[Stream]) -> Iterator[NDArray[np.int64]]:
        for chunk in range(self._layout.chunks):
            with self._costs.timed("unmask"):
                # Each chunk's memory is free again once its integers are taken.
                words, self._sums[chunk] = self._sums[chunk], np.empty(0, self._layout.word)
                add_streams(words, streams, chunk)
                integers = self._layout.integers(words, len(self.participants))
            yield integers
