"""Who a party is: a name with an Ed25519 key to sign and an X25519 key to agree on secrets.

| symbol | name | meaning |
|---|---|---|
| vk | ``verify_key`` | Ed25519 public key, 32 bytes (RFC 8032) |
| xk | ``exchange_key`` | X25519 public key, 32 bytes (RFC 7748) |

What a roster is worth is decided outside of this package: whoever hands out ``PublicIdentity``s
decides who is who. Compare fingerprints over a channel that the relaying server does not own.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedjax_llm.errors import Refused
from fedjax_llm.secure import byte_lists, key_file
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.sums import BadMessage

_KEY_BYTES = 32
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class PublicIdentity:
    """What everyone may know of a party."""

    name: str
    verify_key: bytes
    exchange_key: bytes

    def __post_init__(self) -> None:
        """Refuses names that cannot stand in a line of text, and keys of another length."""
        if not self.name.isprintable() or not 1 <= len(self.name.encode()) <= _MAX_NAME_BYTES:
            raise Refused(
                f"a party's name must be printable, of 1 to {_MAX_NAME_BYTES} bytes, got "
                f"{self.name!r}"
            )
        if len(self.verify_key) != _KEY_BYTES or len(self.exchange_key) != _KEY_BYTES:
            raise Refused(f"party {self.name!r}: both public keys must have {_KEY_BYTES} bytes")

    def to_bytes(self) -> bytes:
        """Name and keys; injective."""
        return frame("identity", self.name.encode(), self.verify_key, self.exchange_key)

    @classmethod
    def from_bytes(cls, data: bytes, sender: str) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming ``sender`` for anything else."""
        name, verify_key, exchange_key = unframe("identity", 3, data, sender)
        try:
            return cls(name.decode(), verify_key, exchange_key)
        except (UnicodeDecodeError, Refused) as err:
            raise BadMessage(sender, f"no identity ({err})") from err

    @property
    def fingerprint(self) -> str:
        """128 bits of SHA-256 over name and keys, for people to compare."""
        digits = hashlib.sha256(self.to_bytes()).hexdigest()[:32]
        return "-".join(digits[at : at + 4] for at in range(0, 32, 4))

    def verify(self, purpose: str, fields: Sequence[bytes], signature: bytes) -> None:
        """Raises ``BadMessage`` unless this party signed these fields for this purpose."""
        try:
            key = Ed25519PublicKey.from_public_bytes(self.verify_key)
            key.verify(signature, _signed(self.name, purpose, fields))
        except (InvalidSignature, ValueError) as err:
            raise BadMessage(
                self.name, f"its signature ({purpose}) is not valid: forged, or of something else"
            ) from err


@dataclass(frozen=True, eq=False)
class Identity:
    """A party's own keys. Make one with ``generate``; it prints nothing secret."""

    name: str
    _signing: Ed25519PrivateKey = field(repr=False)
    _exchange: X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls, name: str) -> Self:
        """Fresh keys from the operating system's generator."""
        made = cls(name, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
        made.public  # noqa: B018 - refuses a bad name here
        return made

    @property
    def public(self) -> PublicIdentity:
        """The half that others may know."""
        return PublicIdentity(
            self.name,
            self._signing.public_key().public_bytes_raw(),
            self._exchange.public_key().public_bytes_raw(),
        )

    def sign(self, purpose: str, *fields: bytes) -> bytes:
        """64 bytes that ``PublicIdentity.verify`` and ``Roster.verify`` accept.

        Formal guarantee: unforgeable (Ed25519), and bound to the signer's name, the purpose, and
        where each field begins and ends, so that no signature serves for another message.
        """
        return self._signing.sign(_signed(self.name, purpose, fields))

    def agree(self, other: PublicIdentity, purpose: str, context: bytes) -> bytes:
        """32 bytes that only this party and ``other`` can compute; both get the same.

        Formal guarantee: under the gap Diffie-Hellman assumption and HKDF-SHA256 as a random
        oracle, uniform to everybody else, and independent for other pairs, purposes, contexts.

        | input | behaviour |
        |---|---|
        | an exchange key of low order, which would make the result known to all | ``BadMessage`` |
        | a party of one's own name | ``Refused`` |

        Args:
            other: the other party; its keys go into the derivation.
            purpose: what the secret is for; one purpose, one use.
            context: what tells apart secrets of one purpose, such as a round.
        """
        if other.name == self.name:
            raise Refused(f"party {self.name!r} agrees on secrets with others, not with itself")
        pair = sorted((self.public.to_bytes(), other.to_bytes()))
        return shared_key(self._exchange, other.exchange_key, other.name, purpose, *pair, context)

    def to_bytes(self) -> bytes:
        """The private keys: for a key file, nothing else."""
        return frame(
            "private identity",
            self.name.encode(),
            self._signing.private_bytes_raw(),
            self._exchange.private_bytes_raw(),
        )

    @classmethod
    def from_bytes(cls, data: bytes, sender: str) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming ``sender`` for anything else."""
        name, signing, exchange = unframe("private identity", 3, data, sender)
        try:
            made = cls(
                name.decode(),
                Ed25519PrivateKey.from_private_bytes(signing),
                X25519PrivateKey.from_private_bytes(exchange),
            )
            made.public  # noqa: B018 - refuses a bad name here
        except (ValueError, Refused) as err:
            raise BadMessage(sender, f"no private identity ({err})") from err
        return made

    def save(self, path: Path) -> None:
        """Writes an owner-only file (``key_file``)."""
        key_file.write(path, "identity file", [self.to_bytes()])

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of ``save``; ``UserError`` naming the file where it cannot be trusted."""
        (data,) = key_file.read(path, "identity file", 1)
        with key_file.contents_of(path):
            return cls.from_bytes(data, str(path))


@dataclass(frozen=True)
class Roster:
    """The parties of a run by name; the order does not matter."""

    identities: tuple[PublicIdentity, ...]

    def __init__(self, identities: Iterable[PublicIdentity]) -> None:
        """Refuses two parties of one name, and two names for one key."""
        ordered = tuple(sorted(identities, key=lambda identity: identity.name))
        object.__setattr__(self, "identities", ordered)
        for what in ("name", "verify_key", "exchange_key"):
            if len({getattr(identity, what) for identity in ordered}) != len(ordered):
                names = [identity.name for identity in ordered]
                raise Refused(f"parties of a roster must differ in {what}, got {names}")

    def __contains__(self, name: object) -> bool:
        return any(identity.name == name for identity in self.identities)

    def __iter__(self) -> Iterator[PublicIdentity]:
        return iter(self.identities)

    def __len__(self) -> int:
        return len(self.identities)

    def __getitem__(self, name: str) -> PublicIdentity:
        """The party of this name; ``BadMessage`` for a stranger."""
        for identity in self.identities:
            if identity.name == name:
                return identity
        raise BadMessage(name, "a stranger: its name is not in the roster")

    def verify(self, name: str, purpose: str, fields: Sequence[bytes], signature: bytes) -> None:
        """Raises ``BadMessage`` naming ``name`` unless it signed these fields for this purpose."""
        self[name].verify(purpose, fields, signature)

    def to_bytes(self) -> bytes:
        """All parties, sorted by name; injective."""
        return byte_lists.join(identity.to_bytes() for identity in self.identities)

    @classmethod
    def from_bytes(cls, data: bytes, sender: str) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming ``sender`` for anything else."""
        items = byte_lists.split(data, sender)
        found = [PublicIdentity.from_bytes(item, sender) for item in items]
        try:
            made = cls(found)
        except Refused as err:
            raise BadMessage(sender, f"no roster ({err})") from err
        if list(made.identities) != found:
            raise BadMessage(sender, "no roster (its parties are not sorted)")
        return made

    def digest(self) -> bytes:
        """32 bytes that name exactly these parties and keys."""
        return hashlib.sha256(self.to_bytes()).digest()


def shared_key(
    own: X25519PrivateKey, other: bytes, other_name: str, purpose: str, *context: bytes
) -> bytes:
    """X25519, then HKDF-SHA256 with purpose and context in its info: 32 bytes."""
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as err:
        raise BadMessage(other_name, "its X25519 key is degenerate") from err
    info = frame("agree", purpose.encode(), *context)
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=info).derive(shared)


def _signed(name: str, purpose: str, fields: Sequence[bytes]) -> bytes:
    return frame("signed", purpose.encode(), name.encode(), *fields)
