"""Step 1 of a masked round: two shares for one recipient, in a box that it alone can open.

The server relays the boxes. Next to each it keeps a digest of either share, so that it can tell
later who revealed another share than was dealt, and who dealt shares of nothing.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import shared_key
from fedjax_llm.secure.masked_messages import Group, Hello
from fedjax_llm.secure.masked_shares import SHARE_BYTES, is_share
from fedjax_llm.secure.sums import BadMessage

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Deal:
    """Step 1: two shares for one recipient, sealed, and what the server can check them by."""

    seed_digest: bytes
    key_digest: bytes
    box: bytes

    def to_bytes(self) -> bytes:
        """The message."""
        return frame("masked deal", self.seed_digest, self.key_digest, self.box)

    @classmethod
    def from_bytes(cls, data: bytes, dealer: str) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming the dealer otherwise."""
        seed_digest, key_digest, box = unframe("masked deal", 3, data, dealer)
        if (len(seed_digest), len(key_digest)) != (_DIGEST_BYTES, _DIGEST_BYTES):
            raise BadMessage(dealer, "its shares' digests have the wrong length")
        return cls(seed_digest, key_digest, box)


def share_digest(context: bytes, dealer: str, holder: str, kind: str, share: bytes) -> bytes:
    """32 bytes by which the server tells a wrong share from a right one.

    Formal guarantee: a share is uniform among more than 2^256 values, and with SHA-256 as a random
    oracle its digest tells nothing to whoever cannot name it.
    """
    head = b"\0".join((b"masked share", dealer.encode(), holder.encode(), kind.encode(), context))
    return hashlib.sha256(head + share).digest()


@dataclass(frozen=True)
class Sealing:
    """Seals shares for others and opens theirs, as one client in one round.

    Formal guarantee: only the recipient learns the shares, and it takes them for the sender's, in
    this round and group, with these digests (X25519 under the gap Diffie-Hellman assumption,
    HKDF-SHA256, ChaCha20-Poly1305; the hellos are signed). The key belongs to the pair and the
    round; it seals one box in either direction, under different nonces.

    Attributes:
        group: of the round.
        context: ``group.context`` of the round.
        client: who seals and opens.
        private_key: to the ``seal_public`` of this client's hello.
    """

    group: Group
    context: bytes
    client: str
    private_key: X25519PrivateKey

    def seal(self, other: Hello, shares: tuple[bytes, bytes]) -> bytes:
        """The ``Deal`` for another client: shares of the self seed and of the mask key."""
        digests = self.digests(self.client, other.client, shares)
        box = ChaCha20Poly1305(self._key(other)).encrypt(
            self._nonce(self.client), b"".join(shares), self._bound(self.client, digests)
        )
        return Deal(*digests, box).to_bytes()

    def keep(self, shares: tuple[bytes, bytes]) -> bytes:
        """The ``Deal`` for oneself: the digests alone."""
        return Deal(*self.digests(self.client, self.client, shares), b"").to_bytes()

    def open(self, dealer: Hello, data: bytes) -> tuple[bytes, bytes]:
        """The inverse of the dealer's ``seal``; ``BadMessage`` naming the dealer otherwise."""
        deal = Deal.from_bytes(data, dealer.client)
        digests = deal.seed_digest, deal.key_digest
        try:
            opened = ChaCha20Poly1305(self._key(dealer)).decrypt(
                self._nonce(dealer.client), deal.box, self._bound(dealer.client, digests)
            )
        except InvalidTag as err:
            raise BadMessage(
                dealer.client, f"its sealed shares for {self.client!r} do not open"
            ) from err
        shares = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        expected = self.digests(dealer.client, self.client, shares)
        if expected != digests or not all(is_share(share) for share in shares):
            raise BadMessage(
                dealer.client, f"its shares for {self.client!r} are not those it announced"
            )
        return shares

    def digests(self, dealer: str, holder: str, shares: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """``share_digest`` of both."""
        seed, key = shares
        return (
            share_digest(self.context, dealer, holder, "seed", seed),
            share_digest(self.context, dealer, holder, "key", key),
        )

    def _key(self, other: Hello) -> bytes:
        pair = (name.encode() for name in sorted((self.client, other.client)))
        public = other.seal_public
        return shared_key(
            self.private_key, public, other.client, "masked seal", self.context, *pair
        )

    def _nonce(self, sender: str) -> bytes:
        return struct.pack("<Q4x", self.group.points[sender])

    def _bound(self, sender: str, digests: tuple[bytes, bytes]) -> bytes:
        return frame("masked box", self.context, sender.encode(), *digests)
