"""The server of one round of OpenFHE ciphertexts: one accumulator, however many clients."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.ciphertext_round import CiphertextSum
from fedjax_llm.secure.intake import Intake
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.library_message import LibraryClient
from fedjax_llm.secure.sums import Costs, RoundNumbers, WrongSum, checked_clients
from fedjax_llm.secure.threads import in_order


class LibraryRound:
    """The ``RoundSum`` of modes ``bfv`` and ``ckks``."""

    def __init__(
        self,
        client: LibraryClient,
        holders: KeyHolders,
        channels: Channels,
        round_number: int,
        numbers: RoundNumbers,
    ) -> None:
        """An empty sum.

        Args:
            client: the public side of this run.
            holders: the clouds.
            channels: the server's side of the clients' channels.
            round_number: above that of any total taken before.
            numbers: remembers whose total was taken.
        """
        numbers.check(round_number)
        self._client, self._holders, self._numbers = client, holders, numbers
        self._round = round_number
        self._costs = Costs()
        self._intake = Intake(
            lambda name: client.header(name, round_number),
            channels,
            client.payload_bytes,
            client.parameters.summands,
            costs=self._costs,
        )
        self._sum = CiphertextSum(client.scheme, client.ciphertexts)
        self._asked = self._opened = False

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads are in the sum, sorted."""
        return self._intake.participants

    @property
    def costs(self) -> Costs:
        """What the round has cost so far."""
        return self._costs

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds one client's upload, all of it or nothing; see ``RoundSum``."""
        self._require_keys()

        def check(chunk: int, payload: memoryview) -> None:
            self._sum.check(payload, client)

        with self._intake.adding(client, upload, check) as received:
            for number, payload in enumerate(received.payloads()):
                self._sum.add(payload, number, client)

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total, a ciphertext at a time; see ``RoundSum``.

        If too few clouds answered it may be asked for again, for the same clients.
        """
        client, holders = self._client, self._holders
        self._intake.require_whole()
        self._require_keys()
        if self._opened:
            raise Refused(f"the total of round {self._round} has been taken already")
        names = self.participants
        checked_clients(names, holders.minimum_clients, client.parameters.summands)
        holders.check_alive(alive)
        if not self._asked:
            self._numbers.take(self._round)
            self._asked = True
        self._intake.close()
        c0, c1 = self._sum.c0(), self._sum.c1()
        partials = holders.decrypt(
            self._round, names, c0, c1, client.ciphertexts, alive, self._costs
        )
        self._opened = True

        def opened(ciphertext: int) -> NDArray[np.int64]:
            return client.unseal(self._sum.open(partials, ciphertext), len(names))

        left = client.count
        totals = in_order(opened, range(client.ciphertexts), client.threads)
        while left:
            with self._costs.timed("unmask"):
                try:
                    piece = next(totals)[:left]
                except WrongSum as err:
                    raise WrongSum(f"round {self._round}: {err}") from err
            left -= piece.size
            yield piece

    def _require_keys(self) -> None:
        if self._holders.key.epoch != self._client.key.epoch:
            raise Refused(f"the keys have changed since round {self._round} began; start it anew")
