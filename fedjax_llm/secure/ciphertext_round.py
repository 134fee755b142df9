"""Ciphertexts of many clients added up, and their sum opened; nothing here is secret.

Adding never calls OpenFHE: a ciphertext is a vector of residues, and its sum is theirs. Modes
``bfv`` and ``ckks`` add all they send this way, mode ``threshold`` the one ciphertext with its
clients' secrets.
"""

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.residues import Residues, add, add_to, pack, packed_bytes, unpack
from fedjax_llm.secure.scheme import Scheme


class CiphertextSum:
    """The accumulator of one round, whatever the number of clients.

    A client's ciphertexts come as payloads, c_0 and c_1 packed (``residues``), one after the
    other. ``add`` takes each of them all or not at all; for an upload of several, ``check`` all
    before the first is added.

    | payload | ``check`` and ``add`` |
    |---|---|
    | of another length, or with a residue that is not below its modulus | BadMessage |
    | residues that nobody's encryption made | pass; decoding or the canary will fail |
    """

    def __init__(self, scheme: Scheme, ciphertexts: int) -> None:
        """The sum of nobody.

        Args:
            scheme: whose ciphertexts they are.
            ciphertexts: how many each client sends.
        """
        self._scheme = scheme
        shape = (ciphertexts, 2, len(scheme.moduli), scheme.ring_dimension)
        self._total: NDArray[np.uint64] = np.zeros(shape, np.uint64)

    @property
    def ciphertexts(self) -> int:
        """How many each client sends."""
        return len(self._total)

    @property
    def payload_bytes(self) -> int:
        """Length of the payload of one ciphertext."""
        return payload_bytes(self._scheme)

    def check(self, payload: bytes | memoryview, sender: str) -> None:
        """Raises BadMessage, naming the sender, unless ``add`` would take this."""
        self._unpacked(payload, sender)

    def add(
        self, payload: bytes | memoryview, ciphertext: int = 0, sender: str = "a client"
    ) -> None:
        """Adds one ciphertext of one client.

        Args:
            payload: from ``pack``.
            ciphertext: which of the client's it is.
            sender: named in errors.

        Raises:
            BadMessage: see the table; the sum is as it was.
        """
        add_to(self._total[ciphertext], self._unpacked(payload, sender), self._scheme.moduli)

    def _unpacked(self, payload: bytes | memoryview, sender: str) -> Residues:
        scheme = self._scheme
        return unpack(payload, 2, scheme.moduli, scheme.ring_dimension, sender)

    def c0(self) -> bytes:
        """c_0 of all ciphertexts, packed."""
        return pack(self._total[:, 0], self._scheme.moduli)

    def c1(self) -> bytes:
        """c_1 of all ciphertexts, packed: what the clouds need to see."""
        return pack(self._total[:, 1], self._scheme.moduli)

    def open(self, partials: Mapping[str, Residues], ciphertext: int = 0) -> NDArray[np.int64]:
        """The N slots of one ciphertext of the sum.

        Formal guarantee: none about correctness. Check the canary.

        Args:
            partials: of each cloud of the decrypting set, [ciphertexts, L, N].
            ciphertext: which one.

        Raises:
            WrongSum: the scheme can tell that it is no decryption.
        """
        moduli = self._scheme.moduli
        parts = (partial[ciphertext : ciphertext + 1] for partial in partials.values())
        fused = functools.reduce(
            lambda left, right: add(left, right, moduli), parts, self._total[ciphertext, :1]
        )
        return self._scheme.decode(fused)

    def fuse(self, partials: Mapping[str, Residues]) -> NDArray[np.int64]:
        """The slots of all ciphertexts, [ciphertexts, N]; see ``open``."""
        return np.stack([self.open(partials, number) for number in range(self.ciphertexts)])


def payload_bytes(scheme: Scheme) -> int:
    """Length of the payload of one ciphertext."""
    return 2 * packed_bytes(scheme.moduli, scheme.ring_dimension)
