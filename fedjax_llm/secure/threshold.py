"""The encrypted sum at the speed of plain text: ring-LWE for the bulk, OpenFHE for its keys.

``ThresholdSum`` runs all parties in one process and passes bytes between them, the same bytes that
would cross the network; ``RingClient``, ``RingRound`` and ``CloudParty`` are the three sides.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_llm.secure.channels import Channels, SimulatedChannels
from fedjax_llm.secure.key_layer import KeyLayer
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.ring_message import KIND, RingClient, RingLayout
from fedjax_llm.secure.ring_round import RingRound
from fedjax_llm.secure.ring_table import choose
from fedjax_llm.secure.sums import Opening, RoundNumbers, checked_ints, checked_plan
from fedjax_llm.secure.wire import upload_bytes


class ThresholdSum:
    """The ``SecureSum`` whose clients send ring-LWE ciphertexts and whose keys t of n clouds hold.

    Set it up on the main thread, and in the process that uses it. Keys live as long as the object,
    in memory only, unless ``folder`` is given.
    """

    kind = KIND

    def __init__(
        self,
        clouds: Sequence[str],
        threshold: int,
        count: int,
        max_abs: int,
        summands: int,
        minimum_clients: int = 2,
        channels: Channels | None = None,
        folder: Path | None = None,
    ) -> None:
        """Chooses parameters, compiles the ring's programs and runs the key ceremony.

        Args:
            clouds: names of the clouds that hold key shares, at least 2.
            threshold: how many of them decrypt together, at least 2.
            count: integers per client.
            max_abs: bound of every integer's absolute value (``FixedPoint.max_int``).
            summands: most clients of one sum.
            minimum_clients: fewest clients whose sum the clouds decrypt. A sum of one is that
                client's message, so less than 2 makes sense only where that is acceptable.
            channels: the server's side of the clients' channels; None simulates them.
            folder: where the clouds keep their key files, opened if they are there; None keeps
                keys in memory.

        Raises:
            Refused: a threshold or minimum that lets one party see one client's message.
            UserError: no parameters for these bounds, or OpenFHE does not work here.
        """
        checked_plan(count, max_abs, summands, minimum_clients)
        self.parameters = choose(max_abs, summands, count)
        self.count, self.max_abs, self.summands = count, max_abs, summands
        self.minimum_clients = minimum_clients
        self._channels = channels or SimulatedChannels()
        self._layout = RingLayout(self.parameters, count)
        self._layout.compile()
        self._key_layer = KeyLayer.open(self.parameters, max(2, len(clouds)))
        self.holders = KeyHolders.at(
            self._key_layer.bfv, clouds, threshold, minimum_clients, folder=folder
        )
        self._client = RingClient(self._layout, self._key_layer, self.holders.key)
        self._numbers = RoundNumbers()

    @property
    def client(self) -> RingClient:
        """The public side: all that a client needs besides its channel key."""
        if self._client.key is not self.holders.key:  # they have been rotated
            self._client = RingClient(self._layout, self._key_layer, self.holders.key)
        return self._client

    def rotate(self) -> None:
        """New keys by a new ceremony; uploads under the old ones are refused from now on."""
        self.holders.rotate()

    def statement(self) -> str:
        """Who can decrypt what."""
        return self.holders.statement()

    def check_alive(self, alive: Sequence[str]) -> None:
        """Refuses, before anybody has worked for it, a sum that could not be decrypted."""
        self.holders.check_alive(alive)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The encrypted upload; see ``RingClient.upload``. Two calls give different bytes."""
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        header = self.client.header(client, round_number)
        key = self._channels.key(client)
        return self.client.upload(header.client, key, header.round_number, [ints])

    def upload_bytes(self, client: str) -> int:
        """Exact length of all chunks of one upload."""
        return upload_bytes(client, self.client.payload_bytes)

    @property
    def opening(self) -> Opening:
        """The clouds receive one half of the key ciphertexts' sum and answer with as much."""
        half = self._key_layer.payload_bytes // 2
        return Opening(self.holders.threshold, half, half)

    def begin(self, round_number: int) -> RingRound:
        """The server's side of this round."""
        return RingRound(
            self.client,
            self.holders,
            self._channels,
            round_number,
            self._numbers,
            self.minimum_clients,
        )
