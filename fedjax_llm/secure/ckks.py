"""CKKS: slots are complex numbers, and sums are exact once they are rounded.

A ciphertext is (c_0, c_1) with c_0 + c_1 s = 2^d times the slots' inverse transform + noise; see
``ckks_parameters`` for d, for the errors and for what decryptions give away.
"""

import math
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError
from fedjax_llm.secure.ckks_parameters import (
    BASE_FLOODING_BITS,
    FIRST_MODULUS_BITS,
    LOG_Q,
    RING_DIMENSION,
    SCALING_MODULUS_BITS,
    CkksParameters,
)
from fedjax_llm.secure.openfhe_scheme import (
    INSTALL,
    OpenFhe,
    learn,
    make_context,
    require_main_thread,
)
from fedjax_llm.secure.residues import Residues, add
from fedjax_llm.secure.sums import WrongSum
from fedjax_llm_kernels.ring_parameters import is_prime


@dataclass(frozen=True)
class Ckks:
    """The ``Scheme`` whose decryptions are approximate. Make it with ``open_ckks``.

    Formal guarantee. Ciphertexts are semantically secure under ring-LWE. A decryption, however,
    is the sum plus noise, and noise is made of the secret key: who sees enough of it finds the
    key (IND-CPA-D: Li and Micciancio, Eurocrypt 2021). Rounding happens after fusing, so that
    clients see integers only and the server that fuses sees the noise. Each cloud floods its
    answer for that reason, and what the server sees is within ``noise_distance`` per ciphertext
    of what can be computed from the sum of the encodings without any key. It is the delta of
    ``cloud_party`` (with a Gaussian in place of a uniform error) and adds up over ciphertexts,
    answers and rounds. It is for noise of encryptions that followed the protocol.

    | fused residues | decode |
    |---|---|
    | every part within a quarter of an integer | the integers |
    | some part a quarter or more away: garbage but for 2^-8192, or a hostile client's | WrongSum |
    """

    parameters: CkksParameters
    openfhe: OpenFhe = field(repr=False)
    kind = "ckks"

    @property
    def moduli(self) -> tuple[int, ...]:
        """The two primes whose product is Q."""
        return self.openfhe.moduli

    @property
    def ring_dimension(self) -> int:
        """N: twice the number of complex slots."""
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
        """[2, L, N]: a ciphertext of up to N signed integers, in pairs of real and imaginary."""
        parts = np.zeros(self.ring_dimension)
        # OpenFHE multiplies by 2^50; its float64 numbers take the rest of the scale exactly.
        parts[: slots.size] = np.ldexp(
            slots.astype(np.float64), self.parameters.scale_bits - SCALING_MODULUS_BITS
        )
        plaintext = self.openfhe.context.MakeCKKSPackedPlaintext(parts.view(np.complex128))
        return self.openfhe.encrypt(public_key, plaintext)

    def decrypt_partially(self, secret_1LN: Residues, c1_1LN: Residues) -> Residues:
        """[1, L, N]: c_1 s plus Gaussian flooding of 2^f, drawn afresh at each call.

        The partial decryption of zero is noise alone; ``ckks_parameters`` says how draws add up.
        """
        shifts = self.parameters.flooding_shifts
        zeros = [np.zeros_like(c1_1LN)] * len(shifts)
        *draws, total = self.openfhe.decrypt_partially(secret_1LN, [c1_1LN, *zeros])
        for draw, shift in zip(reversed(draws), reversed(shifts), strict=True):
            total = add(draw, _shifted(total, shift, self.moduli), self.moduli)
        return total

    def decode_parts(self, fused_1LN: Residues) -> NDArray[np.float64]:
        """The N numbers of c_0 plus all partial decryptions, as they are before rounding."""
        plaintext = self.openfhe.fuse(fused_1LN)
        plaintext.SetLength(self.ring_dimension // 2)
        slots = np.array(plaintext.GetCKKSPackedValueArray(), np.complex128)
        return np.ldexp(slots.view(np.float64), SCALING_MODULUS_BITS - self.parameters.scale_bits)

    def decode(self, fused_1LN: Residues) -> NDArray[np.int64]:
        """The N integers of c_0 plus all partial decryptions; see the class's table."""
        parts = self.decode_parts(fused_1LN)
        rounded = np.rint(parts)
        worst = float(np.abs(parts - rounded).max())
        if not worst < 0.25:
            raise WrongSum(
                f"a decrypted number is {worst:.2f} away from an integer, less than a quarter was "
                "expected: a client has sent what is no encryption, or a key share is missing, "
                "wrong or used twice; nothing is returned"
            )
        return rounded.astype(np.int64)


def _shifted(residues_1LN: Residues, bits: int, moduli: tuple[int, ...]) -> Residues:
    """Times 2^bits, modulo each limb's prime below 2^60: four bits at a time fit 64."""
    primes = np.asarray(moduli, np.uint64)[None, :, None]
    for at in range(0, bits, 4):
        residues_1LN = (residues_1LN << np.uint64(min(4, bits - at))) % primes
    return residues_1LN


def open_ckks(parameters: CkksParameters) -> Ckks:
    """Makes the context, learns the shapes of its objects and tests it with throw-away keys.

    Raises:
        UserError: called on another thread than the main one, or OpenFHE decided on other
            parameters than were asked for, writes an unknown format, floods less than it did, or
            decrypts extreme values wrongly.
    """
    openfhe = require_main_thread()
    asked = openfhe.CCParamsCKKSRNS()
    # One level more than none: there are two primes.
    asked.SetMultiplicativeDepth(1)
    asked.SetFirstModSize(FIRST_MODULUS_BITS)
    asked.SetScalingModSize(SCALING_MODULUS_BITS)
    # Any other technique would take a prime for the scale, which is no power of two.
    asked.SetScalingTechnique(openfhe.FIXEDMANUAL)
    asked.SetRingDim(RING_DIMENSION)
    asked.SetBatchSize(RING_DIMENSION // 2)
    asked.SetCKKSDataType(openfhe.COMPLEX)
    asked.SetSecurityLevel(openfhe.HEStd_128_classic)
    asked.SetSecretKeyDist(openfhe.UNIFORM_TERNARY)
    asked.SetKeySwitchTechnique(openfhe.BV)
    context = make_context(asked)

    ones = np.ones(1, np.complex128)
    learned = learn(context, context.MakeCKKSPackedPlaintext(ones), 2)
    size, moduli = learned.ring_dimension, learned.moduli
    largest = 4 * parameters.max_abs * parameters.summands << parameters.scale_bits
    if (
        size != RING_DIMENSION
        or not all(is_prime(modulus) and modulus % (2 * size) == 1 for modulus in moduli)
        or max(moduli) >= 2**60
        or not largest <= math.prod(moduli) < 2 ** (LOG_Q + 1)
    ):
        raise UserError(
            f"OpenFHE chose other parameters (N = {size}, moduli {moduli}) than {parameters}: "
            f"{INSTALL}"
        )
    ckks = Ckks(parameters, learned)
    _self_test(ckks)
    return ckks


def _self_test(ckks: Ckks) -> None:
    """Extreme sums must come back exactly, and the noise that flooding is made of must be there."""
    size, moduli = ckks.ring_dimension, ckks.moduli
    reference = np.ones((1, len(moduli), size), np.uint64)
    secret, share = ckks.key_share(reference)
    key = ckks.public_key(np.concatenate([share, reference]))
    extreme = ckks.parameters.max_abs * ckks.parameters.summands
    slots = np.linspace(-extreme, extreme, size).astype(np.int64)
    ciphertext = ckks.encrypt(key, slots)
    partial = ckks.decrypt_partially(secret, ciphertext[1:])
    if not np.array_equal(ckks.decode(add(ciphertext[:1], partial, moduli)), slots):
        raise UserError(f"OpenFHE decrypts wrongly with {ckks.parameters}: {INSTALL}")
    (noise,) = ckks.openfhe.decrypt_partially(secret, [np.zeros_like(ciphertext[1:])])
    parts = np.ldexp(ckks.decode_parts(noise), ckks.parameters.scale_bits)
    deviation = float(parts.std()) / math.sqrt(size / 2) / 2.0**BASE_FLOODING_BITS
    if not deviation > 0.9:
        raise UserError(
            f"OpenFHE's partial decryptions carry {deviation:.2g} times the noise that flooding "
            f"is made of: {INSTALL}"
        )
