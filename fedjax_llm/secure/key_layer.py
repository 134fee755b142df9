"""Ring-LWE secrets inside one BFV ciphertext: what the clouds decrypt the sum of.

Slot 0 carries the number 1, the canary, which sums to the number of clients; the others carry the
secret's coefficients, several per slot where the ring has more of them than the ciphertext has
slots (``slots``).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.bfv import Bfv, open_bfv
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import pack, packed_bytes
from fedjax_llm.secure.ring_table import RingParameters
from fedjax_llm.secure.slots import pack_slots, unpack_slots
from fedjax_llm.secure.sums import WrongSum
from fedjax_llm_kernels.ring_parameters import CBD_ETA


@dataclass(frozen=True)
class KeyLayer:
    """The BFV scheme for secrets of ``size`` coefficients, each within [-CBD_ETA, CBD_ETA]."""

    bfv: Bfv
    size: int

    @classmethod
    def open(cls, ring: RingParameters, clouds: int) -> "KeyLayer":
        """The smallest ciphertext that holds the sum of all clients' secrets.

        Args:
            ring: the ring of the secrets, and the most clients of one sum.
            clouds: clouds that hold a key share.

        Raises:
            UserError: see ``parameters.choose`` and ``bfv.open_bfv``.
        """
        size = ring.ring.size
        chosen = choose(CBD_ETA, ring.summands, clouds, size, one_ciphertext=True)
        return cls(open_bfv(chosen), size)

    @property
    def payload_bytes(self) -> int:
        """Bytes of one encrypted secret."""
        return 2 * packed_bytes(self.bfv.moduli, self.bfv.ring_dimension)

    def seal(self, public_key: Any, secret_N: NDArray[np.integer]) -> bytes:
        """A fresh ciphertext of the canary and the secret, under the clouds' joint key."""
        parameters = self.bfv.parameters
        packed = pack_slots(secret_N.astype(np.int64), parameters.radix, parameters.digits)
        slots = np.concatenate([np.ones(1, np.int64), packed])
        return pack(self.bfv.encrypt(public_key, slots), self.bfv.moduli)

    def unseal(self, slots: NDArray[np.int64], clients: int) -> NDArray[np.int32]:
        """The sum of the secrets, from the decrypted slots.

        Raises:
            WrongSum: the canary is not the number of clients, or a coefficient is beyond what so
                many clients can add up to. Garbage passes with a probability below 2^-16 times
                the share of the range that valid sums take, per coefficient.
        """
        parameters = self.bfv.parameters
        used = -(-self.size // parameters.digits)
        flat = unpack_slots(slots[1 : 1 + used], parameters.radix, parameters.digits)
        beyond = np.abs(flat).max(initial=0) > CBD_ETA * clients
        if slots[0] != clients or beyond or slots[1 + used :].any():
            raise WrongSum(
                f"the decrypted sum of the {clients} clients' secrets is wrong (canary "
                f"{int(slots[0])}); a key share is missing, wrong or used twice; nothing is "
                "returned"
            )
        return flat[: self.size].astype(np.int32)
