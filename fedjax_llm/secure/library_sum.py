"""Modes ``bfv`` and ``ckks``: every parameter inside a ciphertext of OpenFHE's.

For comparison with mode ``threshold``, which is ten times smaller and faster by more than that,
and for those who want ciphertexts of a library only. Keys, decrypting sets and their rules are
the same (``keyholders``).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.channels import Channels, SimulatedChannels
from fedjax_llm.secure.ckks import open_ckks
from fedjax_llm.secure.ckks_parameters import CkksParameters, choose_ckks
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.library_message import LibraryClient
from fedjax_llm.secure.library_round import LibraryRound
from fedjax_llm.secure.parameters import Parameters, choose
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import Opening, RoundNumbers, checked_plan
from fedjax_llm.secure.wire import upload_bytes


class LibrarySum:
    """What ``BfvSum`` and ``CkksSum`` share: a ``SecureSum`` over a scheme of OpenFHE.

    All parties run in one process and pass each other the bytes that would cross a network:
    ``LibraryClient``, ``LibraryRound`` and ``CloudParty`` are the three sides.
    """

    def __init__(
        self,
        scheme: Scheme,
        parameters: Parameters | CkksParameters,
        holders: KeyHolders,
        count: int,
        threads: int | None,
        channels: Channels | None,
    ) -> None:
        """Puts the parts together; users call the subclasses."""
        self.scheme, self.parameters, self.holders = scheme, parameters, holders
        self.count, self.max_abs, self.summands = count, parameters.max_abs, parameters.summands
        self.minimum_clients = holders.minimum_clients
        self.channels = SimulatedChannels() if channels is None else channels
        self.numbers = RoundNumbers()
        self._client = LibraryClient(scheme, parameters, holders.key, count, threads)

    @property
    def kind(self) -> str:
        """``"bfv"`` or ``"ckks"``."""
        return self.scheme.kind

    @property
    def client(self) -> LibraryClient:
        """The public side under the present key."""
        held = self._client
        if held.key.epoch != self.holders.key.epoch:
            key = self.holders.key
            self._client = LibraryClient(
                held.scheme, held.parameters, key, held.count, held.threads
            )
        return self._client

    def statement(self) -> str:
        """Who can decrypt what."""
        return self.holders.statement()

    def check_alive(self, alive: Sequence[str]) -> None:
        """Raises BelowThreshold if these clouds could not decrypt."""
        self.holders.check_alive(alive)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """Ciphertext after ciphertext; see ``SecureSum.upload``."""
        return self.client.upload(client, self.channels.key(client), round_number, ints_P)

    def upload_bytes(self, client: str) -> int:
        """Bytes of one upload."""
        return upload_bytes(client, self.client.payload_bytes)

    @property
    def opening(self) -> Opening:
        """The clouds receive one half of the ciphertexts' sum and answer with as much."""
        half = sum(self.client.payload_bytes) // 2
        return Opening(self.holders.threshold, half, half)

    def begin(self, round_number: int) -> LibraryRound:
        """The server's side of this round."""
        return LibraryRound(self.client, self.holders, self.channels, round_number, self.numbers)


class BfvSum(LibrarySum):
    """Mode ``bfv``: exact arithmetic, two or more integers per slot where they are small.

    Flooding hides the ciphertexts' noise from the server up to a statistical distance of 2^-53 per
    ciphertext (``cloud_party``), so that it sees the sum and nothing else.
    """

    def __init__(
        self,
        clouds: Sequence[str],
        threshold: int,
        count: int,
        max_abs: int,
        summands: int,
        minimum_clients: int = 2,
        threads: int | None = None,
        channels: Channels | None = None,
        folder: Path | None = None,
    ) -> None:
        """Chooses parameters and runs the key ceremony between the clouds; main thread only.

        Args:
            clouds: names of the clouds that hold key shares, at least 2.
            threshold: how many of them decrypt together, at least 2.
            count: integers per client.
            max_abs: bound of every integer's absolute value (``FixedPoint.max_int``).
            summands: most clients of one sum.
            minimum_clients: fewest clients whose sum the clouds decrypt. A sum of one is that
                client's message, so less than 2 makes sense only where that is acceptable.
            threads: over ciphertexts; None is one per processor.
            channels: MAC keys; None simulates all parties in this process.
            folder: of the clouds' key files, opened if they are there; None keeps keys in
                memory.

        Raises:
            Refused: a threshold with which one cloud could decrypt.
            UserError: no parameters for these bounds, or OpenFHE does not work here.
        """
        checked_plan(count, max_abs, summands, minimum_clients)
        parameters = choose(max_abs, summands, max(2, len(clouds)), count)
        scheme = open_bfv(parameters)
        holders = KeyHolders.at(scheme, clouds, threshold, minimum_clients, folder)
        super().__init__(scheme, parameters, holders, count, threads, channels)


class CkksSum(LibrarySum):
    """Mode ``ckks``: approximate arithmetic, rounded to the exact sum; two integers per slot.

    Error. A decrypted number is off by at most 1/64 of one in standard deviation, however large
    it is (``ckks_parameters``); it is rounded, and a sum with a number a quarter or more from an
    integer is refused, so that what is returned is exact.

    Security caveat. CKKS is not IND-CPA-D secure (Li and Micciancio, ePrint 2020/1533): its
    decryptions carry noise that depends on the secret key. Clients get rounded sums; the server
    that fuses sees the numbers before. The clouds' flooding, wider than OpenFHE's own by 31 to 54
    bits, hides that noise up to ``parameters.noise_distance`` per ciphertext, and the rounding of
    single clients' float64 encodings up to ``parameters.rounding_distance`` only. Mode ``bfv``
    has neither question.
    """

    def __init__(
        self,
        clouds: Sequence[str],
        threshold: int,
        count: int,
        max_abs: int,
        summands: int,
        minimum_clients: int = 2,
        threads: int | None = None,
        channels: Channels | None = None,
        folder: Path | None = None,
    ) -> None:
        """As ``BfvSum``; a sum may be up to 2^40."""
        checked_plan(count, max_abs, summands, minimum_clients)
        parameters = choose_ckks(max_abs, summands, max(2, len(clouds)))
        scheme = open_ckks(parameters)
        holders = KeyHolders.at(scheme, clouds, threshold, minimum_clients, folder)
        super().__init__(scheme, parameters, holders, count, threads, channels)
        self._chosen = parameters

    def statement(self) -> str:
        """Who can decrypt what, and what is approximate about it."""
        return (
            f"{super().statement()}; CKKS: decrypted numbers are off by "
            f"{self._chosen.error_deviation:.2g} (standard deviation) and rounded before clients "
            "see them, but the server sees them unrounded (IND-CPA-D); the clouds' flooding hides "
            f"noise that depends on keys up to {_power(self._chosen.noise_distance)} and the "
            "rounding of single clients' encodings up to "
            f"{_power(self._chosen.rounding_distance)} (statistical distance, per ciphertext and "
            "decryption)"
        )


def _power(distance: float) -> str:
    return f"2^{math.ceil(math.log2(distance))}"
