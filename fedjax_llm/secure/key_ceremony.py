"""How n clouds make one public key whose secret none of them, and no server, ever holds.

Star-shaped: every message goes through a server that only relays. Six steps.

1. ``hello``: a fresh X25519 public key, and a commitment to a random seed.
2. ``seed``: the seed. All seeds together are expanded to the common reference ``a``, and hashed
   to a public seed for other uses; nobody could choose either, because everybody was committed
   before the first seed was seen.
3. ``commit``: each cloud draws its ternary ``s_i``, computes ``b_i = e_i - a s_i``, and sends
   a commitment to ``b_i``.
4. ``share``: ``b_i``. The joint key is (sum of b_i, a). Committed first, nobody can choose a
   ``b_i`` that cancels the others' and leaves a joint key of which it knows the secret.
5. ``deal``: each cloud Shamir-shares its own ``s_i`` among all, sealed to each recipient
   (X25519, HKDF-SHA256, ChaCha20-Poly1305). Each adds up what it got: a share of sum(s_i).
   Then it forgets ``s_i`` and everything received, but for one key with each other cloud, from
   the same X25519 exchange, for the masks of its answers (``masks``).
6. ``confirm``: each signs the joint key, the group and the roster. Whoever has the roster, a client
   for one, can check that the key it is given is the clouds' own (``check_confirmations``).

Any t shares determine the joint secret, t - 1 are independent of it (``shamir``).

Every message is signed (Ed25519) over the transcript so far: scheme, group, roster, and the bytes
of all messages of all steps before, which hold everybody's fresh values. Formal guarantee: given
an authentic roster and honest clouds, a server that replaces, leaves out, reorders or mixes
messages, of this ceremony or of others, reaches nothing but that the ceremony fails. It can make
it fail, which lets it choose among several honest keys, no more.

Not covered: a cloud that deals wrong shares makes decryptions garbage, which the canary shows
without saying who it was (no verifiable sharing); after that, the cure is a new ceremony.

Sources: Mouchet, Troncoso-Pastoriza, Bossuat, Hubaux, "Multiparty homomorphic encryption from
ring-learning-with-errors", PoPETs 2021 (ePrint 2020/304); Mouchet, Bertrand, Hubaux, "An
efficient threshold access-structure for RLWE-based multiparty homomorphic encryption", J.
Cryptology 2023 (ePrint 2022/780), whose protocol of sharing each ring secret by Shamir this is.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedjax_llm.errors import Refused
from fedjax_llm.secure import byte_lists, shamir
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Identity, Roster, shared_key
from fedjax_llm.secure.joint_key import Group as Group
from fedjax_llm.secure.joint_key import JointKey as JointKey
from fedjax_llm.secure.joint_key import check_confirmations, check_senders, confirmation
from fedjax_llm.secure.masks import expand
from fedjax_llm.secure.residues import Residues, add, pack, packed_bytes, unpack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import BadMessage

_SEED_BYTES = 32
STEPS = ("hello", "seed", "commit", "share", "deal", "confirm", "finish")


@dataclass(frozen=True)
class Outcome:
    """What a cloud takes home; all but ``key`` and ``confirmations`` is secret.

    Attributes:
        key: the joint public key.
        share_1LN: this cloud's Shamir share of the joint secret.
        mask_keys: per other cloud, 32 bytes that only the two of them know.
        confirmations: per cloud, its signature over key, group and roster.
    """

    key: JointKey
    share_1LN: Residues = field(repr=False)
    mask_keys: dict[str, bytes] = field(repr=False)
    confirmations: dict[str, bytes] = field(repr=False)


class Ceremony:
    """One cloud's side: call the methods of ``STEPS`` in order, with the bytes of all clouds.

    Each takes ``{cloud: its message}`` of the step before, one's own included except for ``deal``,
    whose messages go to one cloud each.

    | what the relay hands over | behaviour |
    |---|---|
    | no message of some cloud | ``Refused``, naming it |
    | a message in a stranger's name | ``BadMessage`` |
    | another message than this cloud's own in its name | ``BadMessage`` |
    | a message that was changed, is of another step or of another ceremony | ``BadMessage`` |
    | steps out of order or a second time | ``Refused`` |
    """

    def __init__(self, scheme: Scheme, group: Group, identity: Identity, roster: Roster) -> None:
        """Draws this ceremony's own secrets from the operating system.

        Args:
            scheme: whose residues are shared.
            group: the clouds, this one among them.
            identity: of this cloud.
            roster: of all clouds, and maybe of others.
        """
        if identity.name not in group.clouds or roster[identity.name] != identity.public:
            raise Refused(
                f"cloud {identity.name!r} is not of the group {', '.join(group.clouds)}, or the "
                "roster has other keys in its name; hand out a roster with its public identity"
            )
        self._scheme, self._group, self._identity = scheme, group, identity
        self._roster = Roster(roster[name] for name in group.clouds)
        self._steps = list(STEPS)
        self._transcript = hashlib.sha256(
            frame("transcript", scheme.digest(), group.to_bytes(), self._roster.to_bytes())
        ).digest()
        self._sent = b""
        self._seed = secrets.token_bytes(_SEED_BYTES)
        self._exchange: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._peers: dict[str, bytes] = {}
        self._commitments: dict[str, bytes] = {}
        self._reference: Residues
        self._secret: Residues | None = None
        self._public = self._public_seed = b""
        self._share: Residues | None = None
        self._key: JointKey

    def hello(self) -> bytes:
        """Step 1."""
        self._advance("hello")
        assert self._exchange is not None
        commitment = _commitment("seed", self._identity.name, self._seed)
        return self._send("hello", self._exchange.public_key().public_bytes_raw(), commitment)

    def seed(self, hellos: Mapping[str, bytes]) -> bytes:
        """Step 2."""
        self._advance("seed")
        for name, (public, commitment) in self._receive("hello", 2, hellos).items():
            if len(public) != 32:
                raise BadMessage(name, "its X25519 key has the wrong length")
            self._peers[name], self._commitments[name] = public, commitment
        return self._send("seed", self._seed)

    def commit(self, seeds: Mapping[str, bytes]) -> bytes:
        """Step 3."""
        self._advance("commit")
        found = {name: seed for name, (seed,) in self._receive("seed", 1, seeds).items()}
        for name, seed in found.items():
            opened = _commitment("seed", name, seed) == self._commitments[name]
            if len(seed) != _SEED_BYTES or not opened:
                raise BadMessage(name, "its seed is not the one it had committed to")
        together = byte_lists.join(found[name] for name in self._group.clouds)
        self._public_seed = hashlib.sha256(b"fedjax-llm public seed" + together).digest()
        moduli, size = self._scheme.moduli, self._scheme.ring_dimension
        # Another label than the public seed's: the two have nothing to do with each other.
        rows = [expand(b"common reference" + together, modulus, size) for modulus in moduli]
        self._reference = np.stack(rows)[None]
        self._secret, share = self._scheme.key_share(self._reference)
        self._public = pack(share, moduli)
        return self._send("commit", _commitment("share", self._identity.name, self._public))

    def share(self, commitments: Mapping[str, bytes]) -> bytes:
        """Step 4."""
        self._advance("share")
        for name, (commitment,) in self._receive("commit", 1, commitments).items():
            self._commitments[name] = commitment
        return self._send("share", self._public)

    def deal(self, shares: Mapping[str, bytes]) -> dict[str, bytes]:
        """Step 5: for each other cloud the bytes to relay to it."""
        self._advance("deal")
        assert self._secret is not None
        moduli, size = self._scheme.moduli, self._scheme.ring_dimension
        joint = np.zeros_like(self._reference)
        for name, (public,) in self._receive("share", 1, shares).items():
            if _commitment("share", name, public) != self._commitments[name]:
                raise BadMessage(name, "its key share is not the one it had committed to")
            joint = add(joint, unpack(public, 1, moduli, size, name), moduli)
        residues_2LN = np.concatenate([joint, self._reference])
        self._key = JointKey.of(residues_2LN, self._public_seed, self._group, self._scheme)
        points = [self._group.point(name) for name in self._group.clouds]
        per_limb = [
            shamir.split(row, modulus, self._group.threshold, points)
            for row, modulus in zip(self._secret[0], moduli, strict=True)
        ]
        self._secret = None  # from here on only its shares exist
        sealed = {}
        for name, point in zip(self._group.clouds, points, strict=True):
            dealt = np.stack([shares_of[point] for shares_of in per_limb])[None]
            if name == self._identity.name:
                self._share = dealt
                continue
            # One message per key: a constant nonce is never used twice.
            cipher = ChaCha20Poly1305(self._shared("sealed share", name, self._identity.name, name))
            box = cipher.encrypt(bytes(12), pack(dealt, moduli), self._transcript)
            sealed[name] = self._signed("deal", name.encode(), box)
        return sealed

    def confirm(self, deals: Mapping[str, bytes]) -> bytes:
        """Step 6, with what the others have dealt to this cloud."""
        self._advance("confirm")
        assert self._share is not None
        moduli, size, own = self._scheme.moduli, self._scheme.ring_dimension, self._identity.name
        others = [name for name in self._group.clouds if name != own]
        for name, (recipient, box) in self._opened("deal", 2, deals, others).items():
            if recipient != own.encode():
                raise BadMessage(name, f"its share was not dealt to {own!r}")
            cipher = ChaCha20Poly1305(self._shared("sealed share", name, name, own))
            try:
                dealt = cipher.decrypt(bytes(12), box, self._transcript)
            except InvalidTag as err:
                raise BadMessage(name, "its sealed share does not open") from err
            if len(dealt) != packed_bytes(moduli, size):
                raise BadMessage(name, "its share has the wrong length")
            self._share = add(self._share, unpack(dealt, 1, moduli, size, name), moduli)
        return confirmation(self._key, self._group, self._roster, self._identity)

    def finish(self, confirmations: Mapping[str, bytes]) -> Outcome:
        """This cloud's keys, once all clouds have confirmed the joint one."""
        self._advance("finish")
        assert self._share is not None
        check_confirmations(self._key, self._group, self._scheme, self._roster, confirmations)
        mask_keys = {}
        for name in self._group.clouds:
            if name != self._identity.name:
                first, second = sorted((self._identity.name, name))
                mask_keys[name] = self._shared("answer mask", name, first, second)
        self._exchange, share, self._share = None, self._share, None
        return Outcome(self._key, share, mask_keys, dict(confirmations))

    def _advance(self, step: str) -> None:
        if not self._steps or self._steps[0] != step:
            raise Refused(
                f"key ceremony: step {step!r} out of order, expected "
                f"{self._steps[0] if self._steps else 'none'}; start again"
            )
        self._steps.pop(0)

    def _signed(self, step: str, *bodies: bytes) -> bytes:
        signature = self._identity.sign(f"ceremony {step}", self._transcript, *bodies)
        return frame(step, *bodies, signature)

    def _send(self, step: str, *bodies: bytes) -> bytes:
        self._sent = self._signed(step, *bodies)
        return self._sent

    def _receive(
        self, step: str, bodies: int, messages: Mapping[str, bytes]
    ) -> dict[str, list[bytes]]:
        """Opens a step's messages and adds them to the transcript."""
        own = self._identity.name
        if own in messages and messages[own] != self._sent:
            raise BadMessage(own, f"not the {step!r} that it sent; the relay has replaced it")
        opened = self._opened(step, bodies, messages, self._group.clouds)
        everything = byte_lists.join(messages[name] for name in self._group.clouds)
        self._transcript = hashlib.sha256(
            frame("transcript", self._transcript, step.encode(), everything)
        ).digest()
        return opened

    def _opened(
        self, step: str, bodies: int, messages: Mapping[str, bytes], senders: Sequence[str]
    ) -> dict[str, list[bytes]]:
        check_senders(step, messages, senders)
        opened = {}
        for name in senders:
            *fields, signature = unframe(step, bodies + 1, messages[name], name)
            try:
                signed = [self._transcript, *fields]
                self._roster.verify(name, f"ceremony {step}", signed, signature)
            except BadMessage as err:
                raise BadMessage(
                    name,
                    f"the signature of its {step!r} does not fit the roster and what this cloud "
                    "has seen: a message was replaced on the way; start again",
                ) from err
            opened[name] = fields
        return opened

    def _shared(self, purpose: str, other: str, first: str, second: str) -> bytes:
        assert self._exchange is not None
        context = (first.encode(), second.encode(), self._transcript)
        return shared_key(self._exchange, self._peers[other], other, purpose, *context)


def _commitment(purpose: str, name: str, value: bytes) -> bytes:
    """Hiding for values of full entropy (a seed, a ring-LWE sample), and binding."""
    return hashlib.sha256(frame("commitment", purpose.encode(), name.encode(), value)).digest()
