"""How n clouds make one public key whose secret none of them, and no server, ever holds.

Star-shaped: every message goes through a server that only relays. Five rounds.

1. ``hello``: an X25519 public key, and the SHA-256 of a random seed.
2. ``seed``: the seed. All seeds together are expanded to the common reference ``a``, which nobody
   could choose, because everybody was committed before the first seed was seen.
3. ``commit``: each cloud draws its ternary ``s_i``, computes ``b_i = e_i - a s_i``, and sends
   the SHA-256 of ``b_i``.
4. ``share``: ``b_i``. The joint key is (sum of b_i, a). Committed first, nobody can choose a
   ``b_i`` that cancels the others' and leaves a joint key of which it knows the secret.
5. ``deal``: each cloud Shamir-shares its own ``s_i`` among all, sealed to each recipient
   (X25519, HKDF-SHA256, ChaCha20-Poly1305). Each adds up what it got: a share of sum(s_i).
   Then it forgets ``s_i`` and everything received, but for one key with each other cloud, from
   the same X25519 exchange, for the masks of its answers (``masks``).

Any t shares determine the joint secret, t - 1 are independent of it (``shamir``).

Sources: Mouchet, Troncoso-Pastoriza, Bossuat, Hubaux, "Multiparty homomorphic encryption from
ring-learning-with-errors", PoPETs 2021 (ePrint 2020/304); Mouchet, Bertrand, Hubaux, "An
efficient threshold access-structure for RLWE-based multiparty homomorphic encryption", J.
Cryptology 2023 (ePrint 2022/780), whose protocol of sharing each ring secret by Shamir this is.

Trust: the server relays honestly and the clouds follow the protocol. The messages are not signed
yet: a server that replaces messages could put itself between two clouds. A cloud that deals
wrong shares makes decryptions garbage, which the canary shows.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedjax_llm.errors import Refused
from fedjax_llm.secure import shamir
from fedjax_llm.secure.bfv import Bfv
from fedjax_llm.secure.masks import expand
from fedjax_llm.secure.residues import Residues, add, pack, packed_bytes, unpack
from fedjax_llm.secure.sums import BadMessage
from fedjax_llm.secure.wire import frame, unframe

_SEED_BYTES = 32
_EPOCH_BYTES = 16


@dataclass(frozen=True)
class JointKey:
    """What everyone may know: the public key (b, a) [2, L, N] and its short name, the epoch."""

    residues_2LN: Residues
    epoch: bytes


@dataclass(frozen=True)
class Group:
    """The clouds, in the order of their Shamir points 1..n, and how many must act together."""

    clouds: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        """Refuses groups in which one cloud alone could decrypt."""
        if len(set(self.clouds)) != len(self.clouds) or not all(self.clouds):
            raise Refused(f"clouds must have distinct names, got {list(self.clouds)}")
        if any("\n" in name for name in self.clouds):  # it separates names in requests
            raise Refused(f"clouds' names must be of one line, got {list(self.clouds)}")
        if not 2 <= self.threshold <= len(self.clouds):
            raise Refused(
                f"threshold must be in [2, {len(self.clouds)}] for {len(self.clouds)} clouds, got "
                f"{self.threshold}: below 2, one cloud alone could decrypt"
            )

    def point(self, cloud: str) -> int:
        """The Shamir point of a cloud."""
        return self.clouds.index(cloud) + 1


def common_reference(seeds: Mapping[str, bytes], moduli: tuple[int, ...], size: int) -> Residues:
    """``a`` [1, L, N], uniform, expanded from everybody's seeds with SHAKE-256."""
    transcript = b"".join(
        hashlib.sha256(name.encode()).digest() + seeds[name] for name in sorted(seeds)
    )
    label = b"common reference" + transcript
    return np.stack([expand(label, modulus, size) for modulus in moduli])[None]


def _pair_key(
    own: X25519PrivateKey, other: bytes, purpose: str, first: str, second: str, context: bytes
) -> bytes:
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as err:  # a point of low order, which would make the key known to all
        raise BadMessage(f"{first} or {second}", "its X25519 key is degenerate") from err
    info = frame(purpose, first.encode(), second.encode(), context)
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)


class Ceremony:
    """One cloud's side of the ceremony: call the five methods in order, with everybody's bytes.

    Every method takes ``{cloud: its message}`` of the step before, its own included.
    """

    def __init__(self, bfv: Bfv, group: Group, cloud: str) -> None:
        """Draws this ceremony's own secrets from the operating system."""
        self._bfv, self._group, self._cloud = bfv, group, cloud
        self._seed = secrets.token_bytes(_SEED_BYTES)
        self._exchange = X25519PrivateKey.generate()
        self._peers: dict[str, bytes] = {}
        self._seed_hashes: dict[str, bytes] = {}
        self._share_hashes: dict[str, bytes] = {}
        self._reference: Residues | None = None
        self._secret: Residues | None = None
        self._public: bytes = b""

    def _open(
        self, kind: str, fields: int, messages: Mapping[str, bytes]
    ) -> dict[str, list[bytes]]:
        missing = sorted(set(self._group.clouds) - set(messages))
        if missing:
            raise Refused(
                f"key ceremony: no {kind!r} message from {', '.join(missing)}; start again"
            )
        return {name: unframe(kind, fields, messages[name], name) for name in self._group.clouds}

    def hello(self) -> bytes:
        """Step 1."""
        commitment = hashlib.sha256(self._cloud.encode() + self._seed).digest()
        return frame("hello", self._exchange.public_key().public_bytes_raw(), commitment)

    def seed(self, hellos: Mapping[str, bytes]) -> bytes:
        """Step 2."""
        for name, (public, commitment) in self._open("hello", 2, hellos).items():
            if len(public) != 32:
                raise BadMessage(name, "its X25519 key has the wrong length")
            self._peers[name], self._seed_hashes[name] = public, commitment
        return frame("seed", self._seed)

    def commit(self, seeds: Mapping[str, bytes]) -> bytes:
        """Step 3."""
        found = {name: fields[0] for name, fields in self._open("seed", 1, seeds).items()}
        for name, value in found.items():
            digest = hashlib.sha256(name.encode() + value).digest()
            if len(value) != _SEED_BYTES or digest != self._seed_hashes[name]:
                raise BadMessage(name, "its seed is not the one it had committed to")
        moduli, size = self._bfv.moduli, self._bfv.parameters.ring_dimension
        self._reference = common_reference(found, moduli, size)
        self._secret, share = self._bfv.key_share(self._reference)
        self._public = pack(share, moduli)
        return frame("commit", hashlib.sha256(self._cloud.encode() + self._public).digest())

    def share(self, commitments: Mapping[str, bytes]) -> bytes:
        """Step 4."""
        for name, (commitment,) in self._open("commit", 1, commitments).items():
            self._share_hashes[name] = commitment
        return frame("share", self._public)

    def deal(self, shares: Mapping[str, bytes]) -> tuple[JointKey, dict[str, bytes]]:
        """Step 5: the joint public key, and for each cloud the bytes to relay to it."""
        if self._reference is None or self._secret is None:
            raise Refused("key ceremony: steps out of order; start again")
        moduli, size = self._bfv.moduli, self._bfv.parameters.ring_dimension
        joint = np.zeros_like(self._reference)
        for name, (public,) in self._open("share", 1, shares).items():
            if hashlib.sha256(name.encode() + public).digest() != self._share_hashes[name]:
                raise BadMessage(name, "its key share is not the one it had committed to")
            joint = add(joint, unpack(public, 1, moduli, size, name), moduli)
        key = joint_key(np.concatenate([joint, self._reference]), moduli)
        points = [self._group.point(name) for name in self._group.clouds]
        per_limb = [
            shamir.split(row, modulus, self._group.threshold, points)
            for row, modulus in zip(self._secret[0], moduli, strict=True)
        ]
        self._secret = None  # from here on only its shares exist
        sealed = {}
        for name in self._group.clouds:
            dealt = np.stack([shares_of[self._group.point(name)] for shares_of in per_limb])[None]
            secret_key = _pair_key(
                self._exchange, self._peers[name], "seal-info", self._cloud, name, key.epoch
            )
            # One message per key: a constant nonce is never used twice.
            box = ChaCha20Poly1305(secret_key).encrypt(bytes(12), pack(dealt, moduli), key.epoch)
            sealed[name] = frame("deal", self._cloud.encode(), name.encode(), box)
        return key, sealed

    def finish(self, key: JointKey, deals: Mapping[str, bytes]) -> Residues:
        """This cloud's share of the joint secret, [1, L, N], from what all have dealt to it."""
        moduli, size = self._bfv.moduli, self._bfv.parameters.ring_dimension
        total = np.zeros((1, len(moduli), size), np.uint64)
        for name, (sender, recipient, box) in self._open("deal", 3, deals).items():
            if (sender, recipient) != (name.encode(), self._cloud.encode()):
                raise BadMessage(name, f"its share was not dealt to {self._cloud!r}")
            secret_key = _pair_key(
                self._exchange, self._peers[name], "seal-info", name, self._cloud, key.epoch
            )
            try:
                dealt = ChaCha20Poly1305(secret_key).decrypt(bytes(12), box, key.epoch)
            except InvalidTag as err:
                raise BadMessage(name, "its sealed share does not open") from err
            if len(dealt) != packed_bytes(moduli, size):
                raise BadMessage(name, "its share has the wrong length")
            total = add(total, unpack(dealt, 1, moduli, size, name), moduli)
        return total

    def mask_keys(self, key: JointKey) -> dict[str, bytes]:
        """Per other cloud, the 32 bytes that only the two of them know (see ``masks``)."""
        keys = {}
        for name, public in self._peers.items():
            if name != self._cloud:
                first, second = sorted((self._cloud, name))
                keys[name] = _pair_key(
                    self._exchange, public, "mask-info", first, second, key.epoch
                )
        return keys


def joint_key(residues_2LN: Residues, moduli: tuple[int, ...]) -> JointKey:
    """The public key with its epoch, a digest by which messages name the key they are under."""
    return JointKey(
        residues_2LN, hashlib.sha256(pack(residues_2LN, moduli)).digest()[:_EPOCH_BYTES]
    )
