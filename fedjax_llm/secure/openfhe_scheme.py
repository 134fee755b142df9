"""An OpenFHE context seen from outside: its objects go in and out as residues.

``Bfv`` and ``Ckks`` are made of this and of their own encoding. A ciphertext is (c_0, c_1), a
public key (b, a) with b = e - a s; see ``residues`` for how they lie in OpenFHE's bytes.
"""

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.openfhe_repair import import_openfhe
from fedjax_llm.secure.residues import Residues, Template, read

INSTALL = "install the version that constraints.txt names"


@dataclass(frozen=True)
class OpenFhe:
    """A context and the shapes of its objects.

    Attributes:
        moduli: primes of the limbs.
        ring_dimension: N.
        context: OpenFHE's CryptoContext.
    """

    moduli: tuple[int, ...]
    ring_dimension: int
    context: Any = field(repr=False)
    _ciphertext: Template = field(repr=False)
    _partial: Template = field(repr=False)
    _public_key: Template = field(repr=False)
    _private_key: Template = field(repr=False)
    _process: int = field(repr=False, default_factory=os.getpid)

    def check_process(self) -> None:
        """OpenFHE's generator does not notice a fork: parent and child would draw the same noise.

        Two messages under the same noise give away their difference.
        """
        if os.getpid() != self._process:
            raise Refused(
                "the encrypted sum was set up before this process was forked, which would repeat "
                "its randomness; start processes with 'spawn' and set up the sum in each"
            )

    def read(self, made: Any, elements: int) -> Residues:
        """The residues [elements, L, N] of an OpenFHE object."""
        openfhe = import_openfhe()
        data = openfhe.Serialize(made, openfhe.BINARY)
        return read(data, elements, self.moduli, self.ring_dimension)

    def ciphertext(self, residues_2LN: Residues) -> Any:
        """The OpenFHE ciphertext (c_0, c_1)."""
        openfhe = import_openfhe()
        data = self._ciphertext.write(residues_2LN)
        return openfhe.DeserializeCiphertextString(data, openfhe.BINARY)

    def public_key(self, residues_2LN: Residues) -> Any:
        """The OpenFHE public key (b, a)."""
        openfhe = import_openfhe()
        data = self._public_key.write(residues_2LN)
        return openfhe.DeserializePublicKeyString(data, openfhe.BINARY)

    def key_share(self, reference_1LN: Residues) -> tuple[Residues, Residues]:
        """A fresh ternary secret s and b = e - a s for a common reference a; both [1, L, N]."""
        self.check_process()
        reference = self.public_key(np.concatenate([np.zeros_like(reference_1LN), reference_1LN]))
        # ``fresh``: b must not contain the b of the key it is given, as it would along a chain.
        pair = self.context.MultipartyKeyGen(reference, False, True)
        return self.read(pair.secretKey, 1), self.read(pair.publicKey, 2)[:1]

    def encrypt(self, public_key: Any, plaintext: Any) -> Residues:
        """[2, L, N]: a fresh ciphertext of an OpenFHE plaintext."""
        self.check_process()
        return self.read(self.context.Encrypt(public_key, plaintext), 2)

    def decrypt_partially(self, secret_1LN: Residues, c1s: Sequence[Residues]) -> list[Residues]:
        """Of each c_1, [1, L, N]: c_1 s plus noise of OpenFHE's, drawn afresh at each call."""
        self.check_process()
        openfhe = import_openfhe()
        key = openfhe.DeserializePrivateKeyString(
            self._private_key.write(secret_1LN), openfhe.BINARY
        )
        # "Main" reads c_1 only, so that nobody but the server needs c_0.
        ciphertexts = [self.ciphertext(np.concatenate([np.zeros_like(c1), c1])) for c1 in c1s]
        partials = self.context.MultipartyDecryptMain(ciphertexts, key)
        return [self.read(partial, 1) for partial in partials]

    def fuse(self, fused_1LN: Residues) -> Any:
        """The OpenFHE plaintext of c_0 plus all partial decryptions."""
        openfhe = import_openfhe()
        data = self._partial.write(fused_1LN)
        return self.context.MultipartyDecryptFusion(
            [openfhe.DeserializeCiphertextString(data, openfhe.BINARY)]
        )

    def digest(self, *parameters: object) -> bytes:
        """16 bytes that name the moduli and ``parameters``."""
        named = repr((self.ring_dimension, self.moduli, *parameters))
        return hashlib.sha256(b"fedjax-llm scheme" + named.encode()).digest()[:16]


def require_main_thread() -> Any:
    """The OpenFHE module, for making a context.

    The first use of its generator has to be a key generation and an encoding on the main thread,
    or threads that start together can block one another.

    Raises:
        UserError: called on another thread.
    """
    openfhe = import_openfhe()
    if threading.current_thread() is not threading.main_thread():
        raise UserError("the encrypted sum must be set up on the main thread")
    # Contexts are compared, not rebuilt, when objects are read: tables would be made each time.
    openfhe.DisablePrecomputeCRTTablesAfterDeserializaton()
    return openfhe


def make_context(asked: Any) -> Any:
    """A context for keys, sums and threshold decryption.

    Raises:
        UserError: OpenFHE will not have these parameters.
    """
    openfhe = import_openfhe()
    try:
        context = openfhe.GenCryptoContext(asked)
    except RuntimeError as err:
        # Its messages begin with the path and line of a file of its build.
        reason = str(err).rpartition("(): ")[2]
        raise UserError(f"OpenFHE refuses the parameters ({reason}): {INSTALL}") from err
    for feature in (openfhe.PKE, openfhe.LEVELEDSHE, openfhe.MULTIPARTY):
        context.Enable(feature)
    return context


def learn(context: Any, plaintext: Any, limbs: int) -> OpenFhe:
    """Learns the shapes of a context's objects from throw-away ones.

    Args:
        context: from ``make_context``.
        plaintext: made by it; any.
        limbs: primes in its modulus.

    Raises:
        UserError: OpenFHE writes an unknown format.
    """
    openfhe = import_openfhe()
    size = context.GetRingDimension()
    pair = context.KeyGen()
    ciphertext = context.Encrypt(pair.publicKey, plaintext)
    (partial,) = context.MultipartyDecryptMain([ciphertext], pair.secretKey)
    moduli = Template.moduli_in(openfhe.Serialize(pair.secretKey, openfhe.BINARY), limbs, size)
    if len(set(moduli)) != limbs or not math.isclose(
        math.prod(moduli), context.GetModulus(), rel_tol=1e-9
    ):
        raise UserError(f"OpenFHE's modulus is not the product of {limbs} primes: {INSTALL}")

    def template(made: Any, elements: int) -> Template:
        return Template.of(openfhe.Serialize(made, openfhe.BINARY), elements, moduli, size)

    return OpenFhe(
        moduli,
        size,
        context,
        template(ciphertext, 2),
        template(partial, 1),
        template(pair.publicKey, 2),
        template(pair.secretKey, 1),
    )
