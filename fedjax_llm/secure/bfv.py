"""OpenFHE's BFV behind five operations on residues; the only module that calls its scheme.

Ciphertexts, keys and partial decryptions go in and out as residues [elements, limbs, N] (see
``residues``). A ciphertext is (c_0, c_1) with c_0 + c_1 s = round(Q m / t) + noise; a public key
is (b, a) with b = e - a s.
"""

import math
import os
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.openfhe_repair import import_openfhe
from fedjax_llm.secure.parameters import Parameters, is_prime
from fedjax_llm.secure.residues import Residues, Template, read


@dataclass(frozen=True)
class Bfv:
    """A context and the shapes of its objects. Make it with ``open_bfv`` on the main thread."""

    parameters: Parameters
    moduli: tuple[int, ...]
    _context: Any = field(repr=False)
    _ciphertext: Template = field(repr=False)
    _partial: Template = field(repr=False)
    _public_key: Template = field(repr=False)
    _private_key: Template = field(repr=False)
    _process: int = field(repr=False, default_factory=os.getpid)

    def public_key(self, residues_2LN: Residues) -> Any:
        """The OpenFHE public key (b, a)."""
        openfhe = import_openfhe()
        data = self._public_key.write(residues_2LN)
        return openfhe.DeserializePublicKeyString(data, openfhe.BINARY)

    def _read(self, made: Any, elements: int) -> Residues:
        openfhe = import_openfhe()
        data = openfhe.Serialize(made, openfhe.BINARY)
        return read(data, elements, self.moduli, self.parameters.ring_dimension)

    def _check_process(self) -> None:
        """OpenFHE's generator does not notice a fork: parent and child would draw the same noise.

        Two messages under the same noise give away their difference.
        """
        if os.getpid() != self._process:
            raise Refused(
                "the encrypted sum was set up before this process was forked, which would repeat "
                "its randomness; start processes with 'spawn' and set up the sum in each"
            )

    def key_share(self, reference_1LN: Residues) -> tuple[Residues, Residues]:
        """A fresh ternary secret s and b = e - a s for a common reference a; both [1, L, N]."""
        self._check_process()
        reference = self.public_key(np.concatenate([np.zeros_like(reference_1LN), reference_1LN]))
        # ``fresh``: b must not contain the b of the key it is given, as it would along a chain.
        pair = self._context.MultipartyKeyGen(reference, False, True)
        return self._read(pair.secretKey, 1), self._read(pair.publicKey, 2)[:1]

    def encrypt(self, public_key: Any, slots: NDArray[np.int64]) -> Residues:
        """[2, L, N]: a ciphertext of up to N signed integers, each at most (t - 1) / 2."""
        self._check_process()
        # int64 on purpose: OpenFHE's binding reads other dtypes element by element.
        plaintext = self._context.MakePackedPlaintext(np.ascontiguousarray(slots, np.int64))
        ciphertext = self._context.Encrypt(public_key, plaintext)
        return self._read(ciphertext, 2)

    def decrypt_partially(self, secret_1LN: Residues, c1_1LN: Residues) -> Residues:
        """[1, L, N]: c_1 s plus OpenFHE's flooding noise, drawn afresh at each call."""
        self._check_process()
        openfhe = import_openfhe()
        key = openfhe.DeserializePrivateKeyString(
            self._private_key.write(secret_1LN), openfhe.BINARY
        )
        # "Main" reads c_1 only, so that nobody but the server needs c_0.
        data = self._ciphertext.write(np.concatenate([np.zeros_like(c1_1LN), c1_1LN]))
        ciphertext = openfhe.DeserializeCiphertextString(data, openfhe.BINARY)
        (partial,) = self._context.MultipartyDecryptMain([ciphertext], key)
        return self._read(partial, 1)

    def decode(self, fused_1LN: Residues) -> NDArray[np.int64]:
        """The N slots of c_0 plus all partial decryptions: scaled by t / Q, rounded, decoded."""
        openfhe = import_openfhe()
        data = self._partial.write(fused_1LN)
        fused = openfhe.DeserializeCiphertextString(data, openfhe.BINARY)
        plaintext = self._context.MultipartyDecryptFusion([fused])
        plaintext.SetLength(self.parameters.ring_dimension)
        return np.array(plaintext.GetPackedValue(), np.int64)


def open_bfv(parameters: Parameters) -> Bfv:
    """Makes the context, learns the shapes of its objects and tests it with throw-away keys.

    The first use of OpenFHE's generator has to be a key generation and an encoding on the main
    thread, or threads that start together can block one another; this is where it happens.

    Raises:
        UserError: called on another thread, or OpenFHE decided on other parameters than were
            asked for, writes an unknown format, or decrypts extreme values wrongly.
    """
    openfhe = import_openfhe()
    if threading.current_thread() is not threading.main_thread():
        raise UserError("the encrypted sum must be set up on the main thread")
    # Contexts are compared, not rebuilt, when objects are read: tables would be made each time.
    openfhe.DisablePrecomputeCRTTablesAfterDeserializaton()
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
    context = openfhe.GenCryptoContext(asked)
    for feature in (openfhe.PKE, openfhe.LEVELEDSHE, openfhe.MULTIPARTY):
        context.Enable(feature)

    size, limbs = context.GetRingDimension(), parameters.limbs
    pair = context.KeyGen()
    ciphertext = context.Encrypt(pair.publicKey, context.MakePackedPlaintext(np.zeros(1, np.int64)))
    (partial,) = context.MultipartyDecryptMain([ciphertext], pair.secretKey)

    def template(made: Any, elements: int) -> Template:
        return Template.of(openfhe.Serialize(made, openfhe.BINARY), elements, moduli, size)

    moduli = Template.moduli_in(openfhe.Serialize(pair.secretKey, openfhe.BINARY), limbs, size)
    if (
        size != parameters.ring_dimension
        or not all(is_prime(modulus) and modulus % (2 * size) == 1 for modulus in moduli)
        or len(set(moduli)) != limbs
        or not math.isclose(math.prod(moduli), context.GetModulus(), rel_tol=1e-9)
        or math.prod(moduli).bit_length() > parameters.log_q
        or moduli[0] < 1.25 * parameters.parties * parameters.plaintext_modulus
    ):
        raise UserError(
            f"OpenFHE chose other parameters (N = {size}, moduli {moduli}) than {parameters}: "
            "install the version that constraints.txt names"
        )
    bfv = Bfv(
        parameters,
        moduli,
        context,
        template(ciphertext, 2),
        template(partial, 1),
        template(pair.publicKey, 2),
        template(pair.secretKey, 1),
    )
    _self_test(bfv)
    return bfv


def _self_test(bfv: Bfv) -> None:
    """Extreme slots must come back exactly: beyond some modulus OpenFHE is wrong in silence."""
    t, size = bfv.parameters.plaintext_modulus, bfv.parameters.ring_dimension
    reference = np.ones((1, len(bfv.moduli), size), np.uint64)
    secret, share = bfv.key_share(reference)
    key = bfv.public_key(np.concatenate([share, reference]))
    slots = np.linspace(-((t - 1) // 2), (t - 1) // 2, size).astype(np.int64)
    slots[:2] = (t - 1) // 2, -((t - 1) // 2)
    ciphertext = bfv.encrypt(key, slots)
    partial = bfv.decrypt_partially(secret, ciphertext[1:])
    moduli = np.asarray(bfv.moduli, np.uint64)[None, :, None]
    if not np.array_equal(bfv.decode((ciphertext[:1] + partial) % moduli), slots):
        raise UserError(
            f"OpenFHE decrypts wrongly with {bfv.parameters}: install the version that "
            "constraints.txt names"
        )
