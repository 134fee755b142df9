"""A client's upload under a scheme of OpenFHE: one ciphertext per chunk, every parameter inside.

A ciphertext has room for N slots. The first carries the number 1, the canary, which sums to the
number of clients; the others carry the integers, several per slot where they are small (``slots``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.ciphertext_round import payload_bytes
from fedjax_llm.secure.ckks_parameters import CkksParameters
from fedjax_llm.secure.joint_key import JointKey
from fedjax_llm.secure.parameters import Parameters
from fedjax_llm.secure.residues import pack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.slots import pack_slots, unpack_slots
from fedjax_llm.secure.sums import WrongSum, checked_ints
from fedjax_llm.secure.threads import in_order
from fedjax_llm.secure.wire import Header, UploadWriter, parameters_digest


@dataclass(frozen=True, eq=False)
class LibraryClient:
    """The public side of a run under one key: all that a client needs.

    Formal guarantee. Without the shares of t clouds an upload is indistinguishable from that of
    any other integers (semantic security under ring-LWE). Randomness is fresh in every call.

    Attributes:
        scheme: of the ciphertexts.
        parameters: what it was made with.
        key: the clouds' joint key.
        count: P.
        threads: over ciphertexts; None is one per processor.
    """

    scheme: Scheme
    parameters: Parameters | CkksParameters
    key: JointKey
    count: int
    threads: int | None = None

    @cached_property
    def ciphertexts(self) -> int:
        """Ciphertexts, hence chunks, per upload."""
        return self.parameters.ciphertexts(self.count)

    @cached_property
    def payload_bytes(self) -> tuple[int, ...]:
        """Of each chunk."""
        return (payload_bytes(self.scheme),) * self.ciphertexts

    @cached_property
    def _digest(self) -> bytes:
        p = self.parameters
        return parameters_digest(
            self.scheme.kind, self.count, p.max_abs, p.summands, self.scheme.digest()
        )

    @cached_property
    def _public_key(self) -> Any:
        return self.scheme.public_key(self.key.residues_2LN)

    def header(self, client: str, round_number: int) -> Header:
        """What a client's chunks say of themselves."""
        kind, epoch = self.scheme.kind, self.key.epoch
        return Header(kind, self._digest, epoch, round_number, self.count, client)

    def upload(
        self, client: str, channel_key: bytes, round_number: int, ints_P: Any
    ) -> Iterator[bytes]:
        """Ciphertext after ciphertext, made as they are asked for; see ``SecureSum.upload``."""
        ints = checked_ints(client, ints_P, self.count, self.parameters.max_abs)
        writer = UploadWriter(self.header(client, round_number), channel_key, self.ciphertexts)
        per_ciphertext = self.parameters.per_ciphertext

        def sealed(start: int) -> bytes:
            return self.seal(ints[start : start + per_ciphertext])

        payloads = in_order(sealed, range(0, self.count, per_ciphertext), self.threads)
        return (writer.write(payload) for payload in payloads)

    def seal(self, ints: NDArray[np.integer]) -> bytes:
        """A fresh ciphertext of the canary and up to ``per_ciphertext`` integers."""
        packed = pack_slots(ints.astype(np.int64), self.parameters.radix, self.parameters.digits)
        slots = np.concatenate([np.ones(1, np.int64), packed])
        return pack(self.scheme.encrypt(self._public_key, slots), self.scheme.moduli)

    def unseal(self, slots: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
        """The integers of one decrypted ciphertext, if so many clients can have summed to them.

        Raises:
            WrongSum: the canary is not the number of clients, or an integer is beyond their
                bound. Garbage passes the first with a probability of 1/t under BFV, 2^-8192 under
                CKKS, where decoding refuses it, and the second even less often.
        """
        total = unpack_slots(slots[1:], self.parameters.radix, self.parameters.digits)
        bound = clients * self.parameters.max_abs
        if slots[0] != clients or not -bound <= int(total.min()) <= int(total.max()) <= bound:
            raise WrongSum(
                f"a decryption is wrong (canary {int(slots[0])} for {clients} clients): a client "
                "has sent what is no encryption, or a key share is missing, wrong or used twice; "
                "nothing is returned"
            )
        return total
