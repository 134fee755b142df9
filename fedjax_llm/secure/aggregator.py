"""The server of one round: adds ciphertexts and fuses partial decryptions; holds nothing secret.

It never calls OpenFHE to add: a ciphertext is a vector of residues, and its sum is theirs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.bfv import Bfv
from fedjax_llm.secure.cloud_party import decrypt_request
from fedjax_llm.secure.residues import Residues, add, pack, packed_bytes, unpack
from fedjax_llm.secure.slots import unpack_slots
from fedjax_llm.secure.sums import BadMessage, WrongSum
from fedjax_llm.secure.wire import open_message, unframe

KIND = "threshold"


class Aggregator:
    """One round. Add all messages, send ``request``, ``fuse`` the answers."""

    def __init__(self, bfv: Bfv, epoch: bytes, round_number: int, count: int) -> None:
        """One accumulator is all the memory it takes, whatever the number of clients."""
        parameters = bfv.parameters
        self._bfv, self._epoch, self._round, self._count = bfv, epoch, round_number, count
        self._chunks = chunks_of(bfv, count)
        self._size = parameters.ring_dimension
        shape = (2 * self._chunks, len(bfv.moduli), self._size)
        self._total: Residues = np.zeros(shape, np.uint64)
        self._clients: list[str] = []
        self._request: bytes | None = None
        self._asked: frozenset[str] = frozenset()

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose messages are in the sum, sorted."""
        return tuple(sorted(self._clients))

    def add(self, client: str, data: bytes) -> None:
        """Adds one client's message.

        Raises:
            BadMessage: damaged, of another round, run or client, a duplicate, or not residues.
                The sum is as it was.
            Refused: the sum is full, or its decryption has been asked for.
        """
        if self._request is not None or len(self._clients) >= self._bfv.parameters.summands:
            raise Refused(
                f"client {client!r} is too late: round {self._round} has its sum of "
                f"{len(self._clients)} clients"
            )
        if client in self._clients:
            raise BadMessage(client, f"a second message for round {self._round}")
        body = open_message(KIND, client, self._round, self._epoch, self._count, data)
        moduli = self._bfv.moduli
        received = unpack(body, 2 * self._chunks, moduli, self._size, client)
        self._total = add(self._total, received, moduli)
        self._clients.append(client)

    def request(self, clouds: Sequence[str]) -> bytes:
        """What to send to each cloud of the decrypting set; fixes the set and the sum."""
        if self._request is None:
            c1 = pack(self._total[1::2], self._bfv.moduli)
            self._asked = frozenset(clouds)
            self._request = decrypt_request(
                self._round, self._epoch, clouds, len(self._clients), c1
            )
        return self._request

    def fuse(self, partials: Mapping[str, bytes]) -> NDArray[np.int64]:
        """The sum, [count].

        Raises:
            BadMessage: naming the cloud whose answer is damaged or belongs elsewhere.
            WrongSum: an answer is missing, superfluous or made with another key share.
        """
        if set(partials) != self._asked:
            raise WrongSum(
                f"round {self._round}: {', '.join(sorted(partials)) or 'no cloud'} answered, asked "
                f"were {', '.join(sorted(self._asked)) or 'none'}; nothing is returned"
            )
        parameters, moduli = self._bfv.parameters, self._bfv.moduli
        fused = self._total[0::2].copy()
        for cloud, data in partials.items():
            name, number, epoch, body = unframe("partial", 4, data, cloud)
            expected = (cloud.encode(), self._round.to_bytes(8, "little"), self._epoch)
            if (name, number, epoch) != expected:
                raise BadMessage(cloud, f"its answer is not its own for round {self._round}")
            fused = add(fused, unpack(body, self._chunks, moduli, self._size, cloud), moduli)
        slots = np.stack([self._bfv.decode(chunk[None]) for chunk in fused])
        participants = len(self._clients)
        total = unpack_slots(
            slots[:, 1:].reshape(-1), parameters.radix, parameters.digits, self._padded()
        )
        # Garbage passes the canary with probability 1/t per ciphertext, and the range even less.
        within = np.abs(total) <= participants * parameters.max_abs
        if (slots[:, 0] != participants).any() or not within.all():
            raise WrongSum(
                f"round {self._round}: the decryption by {', '.join(sorted(partials))} is wrong "
                "(canary); a key share is missing, wrong or used twice; nothing is returned"
            )
        return total[: self._count]

    def _padded(self) -> int:
        return self._chunks * self._bfv.parameters.per_ciphertext


def chunks_of(bfv: Bfv, count: int) -> int:
    """Ciphertexts that ``count`` integers take."""
    return -(-count // bfv.parameters.per_ciphertext)


def message_bytes(bfv: Bfv, count: int) -> int:
    """Bytes of residues in one client's message, without its header."""
    parameters = bfv.parameters
    return 2 * chunks_of(bfv, count) * packed_bytes(bfv.moduli, parameters.ring_dimension)
