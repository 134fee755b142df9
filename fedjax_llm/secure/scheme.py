"""What a threshold scheme of OpenFHE does for the protocol: five operations on residues.

``Bfv`` and ``Ckks`` are the two. The ceremony, the clouds, the masks and the server of a round
know nothing else of a scheme, because in both

    c_0 + c_1 s = the encoded slots + noise          (a ciphertext)
    b + a s     = noise                              (a public key (b, a))

hold in one ring, and sums of ciphertexts, of key shares and of partial decryptions are sums of
residues. Shapes: [elements, limbs, N]; the letters in names say so (2LN: two elements).
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.residues import Residues


class Scheme(Protocol):
    """A context of OpenFHE. Set it up on the main thread; its methods may run on threads."""

    @property
    def kind(self) -> str:
        """``"bfv"`` or ``"ckks"``."""

    @property
    def moduli(self) -> tuple[int, ...]:
        """The primes whose product is Q, one per limb."""

    @property
    def ring_dimension(self) -> int:
        """N: coefficients per ring element, and signed integers per ciphertext."""

    def digest(self) -> bytes:
        """16 bytes that name the parameters; equal where ciphertexts may be added."""

    def public_key(self, residues_2LN: Residues) -> Any:
        """OpenFHE's public key (b, a), for ``encrypt``."""

    def key_share(self, reference_1LN: Residues) -> tuple[Residues, Residues]:
        """A fresh secret s and b = e - a s for a common reference a; both [1, L, N]."""

    def encrypt(self, public_key: Any, slots: NDArray[np.int64]) -> Residues:
        """[2, L, N]: a fresh ciphertext of up to N signed integers.

        Raises:
            Refused: the process has been forked since the context was made.
        """

    def decrypt_partially(self, secret_1LN: Residues, c1_1LN: Residues) -> Residues:
        """[1, L, N]: c_1 s plus flooding noise, drawn afresh at each call."""

    def decode(self, fused_1LN: Residues) -> NDArray[np.int64]:
        """The N integers of c_0 plus all partial decryptions.

        Raises:
            WrongSum: the scheme can tell that this is not a decryption.
        """
