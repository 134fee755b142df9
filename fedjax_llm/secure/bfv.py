"""BFV: slots are integers modulo a prime t, and sums are exact.

A ciphertext is (c_0, c_1) with c_0 + c_1 s = round(Q m / t) + noise.
"""

from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError
from fedjax_llm.secure.openfhe_scheme import (
    INSTALL,
    OpenFhe,
    learn,
    make_context,
    require_main_thread,
)
from fedjax_llm.secure.parameters import Parameters
from fedjax_llm.secure.residues import Residues, add
from fedjax_llm.secure.shamir import scale
from fedjax_llm_kernels.ring_parameters import is_prime


@dataclass(frozen=True)
class Bfv:
    """The ``Scheme`` for exact sums. Make it with ``open_bfv`` on the main thread."""

    parameters: Parameters
    openfhe: OpenFhe = field(repr=False)
    kind = "bfv"

    @property
    def moduli(self) -> tuple[int, ...]:
        """The primes whose product is Q, one per limb."""
        return self.openfhe.moduli

    @property
    def ring_dimension(self) -> int:
        """N, and slots per ciphertext."""
        return self.openfhe.ring_dimension

    def digest(self) -> bytes:
        """16 bytes that name the parameters."""
        return self.openfhe.digest(self.kind, *astuple(self.parameters))

    def public_key(self, residues_2LN: Residues) -> Any:
        """The OpenFHE public key (b, a)."""
        return self.openfhe.public_key(residues_2LN)

    def key_share(self, reference_1LN: Residues) -> tuple[Residues, Residues]:
        """A fresh ternary secret s and b = e - a s for a common reference a; both [1, L, N]."""
        return self.openfhe.key_share(reference_1LN)

    def encrypt(self, public_key: Any, slots: NDArray[np.int64]) -> Residues:
        """[2, L, N]: a ciphertext of up to N signed integers, each at most (t - 1) / 2."""
        # int64 on purpose: OpenFHE's binding reads other dtypes element by element.
        slots = np.ascontiguousarray(slots, np.int64)
        return self.openfhe.encrypt(public_key, self.openfhe.context.MakePackedPlaintext(slots))

    def decrypt_partially(self, secret_1LN: Residues, c1_1LN: Residues) -> Residues:
        """[1, L, N]: c_1 s plus OpenFHE's flooding noise, drawn afresh at each call."""
        (partial,) = self.openfhe.decrypt_partially(secret_1LN, [c1_1LN])
        return partial

    def decode(self, fused_1LN: Residues) -> NDArray[np.int64]:
        """The N slots of c_0 plus all partial decryptions: scaled by t / Q, rounded, decoded.

        Garbage decodes to other garbage; the canary is what finds it.
        """
        plaintext = self.openfhe.fuse(fused_1LN)
        plaintext.SetLength(self.ring_dimension)
        return np.array(plaintext.GetPackedValueArray(), np.int64)


def open_bfv(parameters: Parameters) -> Bfv:
    """Makes the context, learns the shapes of its objects and tests it with throw-away keys.

    Raises:
        UserError: called on another thread than the main one, or OpenFHE decided on other
            parameters than were asked for, writes an unknown format, or decrypts extreme values
            under the widest flooding wrongly.
    """
    openfhe = require_main_thread()
    asked = openfhe.CCParamsBFVRNS()
    asked.SetPlaintextModulus(parameters.plaintext_modulus)
    asked.SetMultiplicativeDepth(0)
    asked.SetEvalAddCount(parameters.summands)
    asked.SetThresholdNumOfParties(parameters.parties)
    asked.SetScalingModSize(parameters.limb_bits)
    asked.SetRingDim(parameters.ring_dimension)
    asked.SetSecurityLevel(openfhe.HEStd_128_classic)
    asked.SetSecretKeyDist(openfhe.UNIFORM_TERNARY)
    asked.SetKeySwitchTechnique(openfhe.BV)
    asked.SetMultipartyMode(openfhe.NOISE_FLOODING_MULTIPARTY)
    context = make_context(asked)

    learned = learn(context, context.MakePackedPlaintext(np.zeros(1, np.int64)), parameters.limbs)
    size, moduli = learned.ring_dimension, learned.moduli
    if (
        size != parameters.ring_dimension
        or not all(is_prime(modulus) and modulus % (2 * size) == 1 for modulus in moduli)
        or sum(modulus.bit_length() for modulus in moduli) > parameters.log_q
        or moduli[0] < 1.25 * parameters.parties * parameters.plaintext_modulus
    ):
        raise UserError(
            f"OpenFHE chose other parameters (N = {size}, moduli {moduli}) than {parameters}: "
            f"{INSTALL}"
        )
    bfv = Bfv(parameters, learned)
    _self_test(bfv)
    return bfv


def _self_test(bfv: Bfv) -> None:
    """Extreme slots must come back exactly, however far the flooding of all clouds adds up.

    Beyond some modulus OpenFHE is wrong in silence, and under wide flooding sooner. Noise in
    proportion comes closer to the bound than that of independent clouds ever will.
    """
    t, size = bfv.parameters.plaintext_modulus, bfv.ring_dimension
    reference = np.ones((1, len(bfv.moduli), size), np.uint64)
    secret, share = bfv.key_share(reference)
    key = bfv.public_key(np.concatenate([share, reference]))
    slots = np.linspace(-((t - 1) // 2), (t - 1) // 2, size).astype(np.int64)
    slots[:2] = (t - 1) // 2, -((t - 1) // 2)
    ciphertext = bfv.encrypt(key, slots)
    partial = bfv.decrypt_partially(secret, ciphertext[1:])
    # A cloud's answer to zero is its flooding alone; all the others are taken to draw the same.
    noise = bfv.decrypt_partially(secret, np.zeros_like(partial))
    rows = zip(noise[0], bfv.moduli, strict=True)
    others = np.stack([scale(row, bfv.parameters.parties - 1, q) for row, q in rows])[None]
    fused = add(add(ciphertext[:1], partial, bfv.moduli), others, bfv.moduli)
    if not np.array_equal(bfv.decode(fused), slots):
        raise UserError(f"OpenFHE decrypts wrongly with {bfv.parameters}: {INSTALL}")
