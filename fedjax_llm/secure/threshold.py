"""The encrypted sum: threshold BFV over n clouds, of which any t together decrypt sums only.

``ThresholdSum`` runs all parties in one process and passes bytes between them, the same bytes
that would cross the network; ``client_message``, ``CloudParty`` and ``Aggregator`` are the three
sides. Whatever becomes faster inside (a ring-LWE bulk layer under keys that are summed like
this) changes ``client_message`` and ``Aggregator`` and nothing outside.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.aggregator import KIND, Aggregator, chunks_of
from fedjax_llm.secure.bfv import Bfv, open_bfv
from fedjax_llm.secure.cloud_party import CloudParty
from fedjax_llm.secure.key_ceremony import Group, JointKey
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import pack
from fedjax_llm.secure.slots import pack_slots
from fedjax_llm.secure.sums import BelowThreshold, SumResult, checked_clients, checked_ints
from fedjax_llm.secure.wire import message


def client_message(
    bfv: Bfv,
    public_key: Any,
    epoch: bytes,
    client: str,
    round_number: int,
    ints_P: NDArray[np.int64],
    run: Callable[..., Any] = map,
) -> bytes:
    """A client's integers, packed into slots and encrypted under the clouds' joint key.

    Formal guarantee: without the shares of t clouds the bytes are indistinguishable from those of
    any other integers (semantic security of BFV under ring-LWE). Fresh randomness every time.

    Args:
        bfv: the scheme, and the bound of the integers.
        public_key: from ``bfv.public_key``.
        epoch: short name of that key.
        client: who sends.
        round_number: for which sum.
        ints_P: int64, already checked against the bound.
        run: ``map`` or an executor's; one call per ciphertext. Threads, never forked processes,
            which would all draw the same noise.
    """
    parameters = bfv.parameters
    chunks, per_slot = chunks_of(bfv, ints_P.size), parameters.digits
    slots = np.zeros((chunks, parameters.ring_dimension - 1), np.int64)
    packed = pack_slots(ints_P, parameters.radix, per_slot)
    slots.reshape(-1)[: packed.size] = packed
    canary = np.ones((chunks, 1), np.int64)

    def encrypt(row: NDArray[np.int64]) -> bytes:
        return pack(bfv.encrypt(public_key, row), bfv.moduli)

    body = b"".join(run(encrypt, np.concatenate([canary, slots], axis=1)))
    return message(KIND, client, round_number, epoch, ints_P.size, body)


def run_ceremony(parties: Sequence[CloudParty]) -> tuple[JointKey, dict[str, int], dict[str, int]]:
    """Relays the five steps of ``key_ceremony`` between the clouds, as the server does.

    Returns:
        The joint public key, and per cloud the bytes it sent and received.
    """
    names = [party.cloud for party in parties]
    up, down = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def exchange(step: Callable[[CloudParty], bytes]) -> dict[str, bytes]:
        sent = {party.cloud: step(party) for party in parties}
        for name, data in sent.items():
            up[name] += len(data)
            down[name] += sum(len(other) for sender, other in sent.items() if sender != name)
        return sent

    hellos = exchange(lambda party: party.ceremony.hello())
    seeds = exchange(lambda party: party.ceremony.seed(hellos))
    commitments = exchange(lambda party: party.ceremony.commit(seeds))
    shares = exchange(lambda party: party.ceremony.share(commitments))
    dealt = {party.cloud: party.ceremony.deal(shares) for party in parties}
    key = dealt[names[0]][0]
    if any(other.epoch != key.epoch for other, _ in dealt.values()):
        raise Refused("key ceremony: the clouds computed different joint keys; start again")
    for party in parties:
        deals = {sender: dealt[sender][1][party.cloud] for sender in names}
        for sender, data in deals.items():
            if sender != party.cloud:
                up[sender] += len(data)
                down[party.cloud] += len(data)
        party.finish(key, deals)
    return key, up, down


class ThresholdSum:
    """The ``SecureSum`` in which clients send ciphertexts and t of n clouds decrypt the sum.

    Set it up on the main thread. Keys live as long as the object, in memory only.
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
    ) -> None:
        """Chooses parameters and runs the key ceremony between the clouds.

        Args:
            clouds: names of the clouds that hold key shares, at least 2.
            threshold: how many of them decrypt together, at least 2.
            count: integers per message.
            max_abs: bound of every integer's absolute value (``FixedPoint.max_int``).
            summands: most clients of one sum.
            minimum_clients: fewest clients whose sum the clouds decrypt. A sum of one is that
                client's message, so less than 2 makes sense only where that is acceptable.
            threads: threads over ciphertexts; None is one per processor.

        Raises:
            Refused: a threshold or minimum that lets one party see one client's message.
            UserError: no parameters for these bounds, or OpenFHE does not work here.
        """
        if count < 1 or minimum_clients < 1:
            raise UserError(
                f"count and minimum_clients must be at least 1, got {count} and {minimum_clients}"
            )
        self.group = Group(tuple(clouds), threshold)
        self.count, self.minimum_clients = count, minimum_clients
        self.parameters = choose(max_abs, summands, len(self.group.clouds))
        self.bfv = open_bfv(self.parameters)
        self._threads = threads or os.cpu_count() or 1
        self._parties = {
            name: CloudParty(self.bfv, self.group, name, minimum_clients)
            for name in self.group.clouds
        }
        self.key, self.ceremony_bytes_up, self.ceremony_bytes_down = run_ceremony(
            list(self._parties.values())
        )
        self._public_key = self.bfv.public_key(self.key.residues_2LN)
        self._encrypt_seconds: dict[int, float] = {}

    def statement(self) -> str:
        """Who can decrypt what."""
        clouds = self.group.clouds
        return (
            f"any {self.group.threshold} of the {len(clouds)} clouds ({', '.join(clouds)}) can "
            "together decrypt, fewer cannot; they answer only for sums that the server declares "
            f"to have {self.minimum_clients} or more clients; the server holds no key share; "
            "simulated: one process plays all parties"
        )

    def check_alive(self, alive: Sequence[str]) -> None:
        """Refuses, before anybody has worked for it, a sum that could not be decrypted."""
        missing = [name for name in self.group.clouds if name not in alive]
        living = len(self.group.clouds) - len(missing)
        if living < self.group.threshold:
            raise BelowThreshold(
                f"decryption needs {self.group.threshold} of {len(self.group.clouds)} clouds, "
                f"{living} alive, missing {', '.join(missing)}; start one of them again"
            )

    def encode_message(self, client: str, round_number: int, ints_P: NDArray[np.integer]) -> bytes:
        """The encrypted upload; see ``client_message``. Two calls give different bytes."""
        start = time.perf_counter()
        ints = checked_ints(client, ints_P, self.count, self.parameters.max_abs)
        with ThreadPoolExecutor(self._threads) as pool:
            data = client_message(
                self.bfv, self._public_key, self.key.epoch, client, round_number, ints, pool.map
            )
        spent = self._encrypt_seconds.get(round_number, 0.0) + time.perf_counter() - start
        # Rounds that never came to a sum must not pile up.
        self._encrypt_seconds = {round_number: spent}
        return data

    def sum(
        self, messages: Mapping[str, bytes], round_number: int, alive: Sequence[str] = ()
    ) -> SumResult:
        """Adds, has the first t clouds that are alive decrypt, and fuses.

        All clouds of the set must stay alive until they have answered. Should one die in between,
        the others will not answer with another set for this round; the clients then encrypt the
        same integers again under a new round number.

        Args:
            messages: client -> message.
            round_number: larger than that of any sum before.
            alive: the clouds that can decrypt now; must hold t of the group.
        """
        self.check_alive(alive)
        living = [name for name in self.group.clouds if name in alive]
        checked_clients(list(messages), self.minimum_clients, self.parameters.summands)
        start = time.perf_counter()
        server = Aggregator(self.bfv, self.key.epoch, round_number, self.count)
        for client in sorted(messages):
            server.add(client, messages[client])
        added = time.perf_counter()
        chosen = living[: self.group.threshold]
        request = server.request(chosen)
        with ThreadPoolExecutor(self._threads) as pool:
            answers = pool.map(lambda name: self._parties[name].partial_decryption(request), chosen)
            partials = dict(zip(chosen, answers, strict=True))
        decrypted = time.perf_counter()
        total_P = server.fuse(partials)
        seconds = {
            "encrypt": self._encrypt_seconds.pop(round_number, 0.0),
            "add": added - start,
            "partial decrypt": decrypted - added,
            "fuse": time.perf_counter() - decrypted,
        }
        idle = dict.fromkeys(self.group.clouds, 0)
        up = idle | {name: len(data) for name, data in partials.items()}
        down = idle | dict.fromkeys(chosen, len(request))
        return SumResult(total_P, server.clients, up, down, seconds)
