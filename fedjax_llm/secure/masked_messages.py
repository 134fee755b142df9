"""What clients of a masked sum and their server tell each other, apart from the uploads.

| step | message | from, to | content |
|---|---|---|---|
| 0 | ``Hello`` | client, all | public mask key, public sealing key, fingerprint of b_i; signed |
| 1 | ``masked_deals.Deal`` | client, each other | shares of b_i and of its mask key, sealed |
| 1 | view | client, all | its signature on ``View``: whom it pairs with |
| 3 | ``Survivors`` | server, all | who dealt, whose uploads are complete; with the latter's views |
| 3 | consent | client, server | its signature on ``Survivors`` |
| 3 | ``Request`` | server, all | ``Survivors``, and the signatures of t clients |
| 3 | ``Reveal`` | client, server | one share per client that dealt; signed |

A ``Reveal`` has room for one share of each client, and ``Survivors`` says which of its two it is:
that of b_i if its upload is in the sum, else that of its mask key. It cannot hold both.

All messages name the round and the epoch, which is the digest of the group and its run. Signatures
bind the purpose and the signer's name as well (``identity``).
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from fedjax_llm.errors import Refused
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.masked_shares import SHARE_BYTES, is_share
from fedjax_llm.secure.sums import BadMessage

SERVER = "the server"
SIGNATURE_BYTES = 64
RUN_BYTES = 16
_KEY_BYTES = 32
CONSENT = "masked consent"
VIEW = "masked view"


@dataclass(frozen=True)
class Group:
    """The clients of a masked sum and how many of them make a round end.

    Attributes:
        roster: names and public keys; who hands it out decides who is who.
        threshold: t, in (n / 2, n].
        minimum_clients: fewest clients whose sum a client helps to uncover.
        run: 16 bytes, drawn for this run and no secret. An upload of an earlier run of the same
            clients is refused by its epoch: under other masks it would spoil the sum.
    """

    roster: Roster
    threshold: int
    minimum_clients: int = field(default=2)
    run: bytes = field(kw_only=True)

    def __post_init__(self) -> None:
        """Refuses groups in which one survivor set would not exclude another."""
        n = len(self.roster)
        if n < 2:
            raise Refused(f"masks are shared between at least 2 clients, got {n}")
        if not n // 2 < self.threshold <= n:
            raise Refused(
                f"threshold must be in [{n // 2 + 1}, {n}] for {n} clients, got "
                f"{self.threshold}: with half of them or fewer, two sets of survivors could both "
                "be uncovered, and their difference is a client's update"
            )
        if not 1 <= self.minimum_clients <= n:
            raise Refused(
                f"minimum_clients must be in [1, {n}] for {n} clients, got {self.minimum_clients}"
            )
        if len(self.run) != RUN_BYTES:
            raise Refused(f"a run is named by {RUN_BYTES} random bytes, got {len(self.run)}")

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """All names, sorted; a client's place is its Shamir point, from 1."""
        return tuple(identity.name for identity in self.roster)

    @cached_property
    def points(self) -> dict[str, int]:
        """Client -> Shamir point."""
        return {name: place for place, name in enumerate(self.clients, start=1)}

    @cached_property
    def epoch(self) -> bytes:
        """16 bytes that name roster, threshold, minimum and run."""
        numbers = struct.pack("<QQ", self.threshold, self.minimum_clients)
        named = frame("masked group", self.roster.digest(), numbers, self.run)
        return hashlib.sha256(named).digest()[:16]

    @property
    def helpers(self) -> int:
        """Fewest clients with which a server that lies sees another client's integers.

        That is min(2 t - n, minimum_clients - 1): two survivor sets, or one of these clients and
        their victim; ``masked_client`` has the argument. Where all n clients must be in a sum
        there is no second set, and it takes t of them to rebuild a secret.
        """
        n, t = len(self.roster), self.threshold
        return min(2 * t - n if self.minimum_clients < n else t, self.minimum_clients - 1)

    def context(self, round_number: int) -> bytes:
        """What every derived key, signature and sealed box of a round is bound to."""
        return self.epoch + struct.pack("<Q", round_number)

    def bitmap(self, names: Iterable[str]) -> bytes:
        """A set of clients, one bit each."""
        bits = sum(1 << (self.points[name] - 1) for name in names)
        return bits.to_bytes(-(-len(self.clients) // 8), "little")

    def named(self, bitmap: bytes, sender: str) -> tuple[str, ...]:
        """The inverse of ``bitmap``, sorted; ``BadMessage`` naming ``sender`` otherwise."""
        bits = int.from_bytes(bitmap, "little")
        if len(bitmap) != -(-len(self.clients) // 8) or bits >> len(self.clients):
            raise BadMessage(sender, f"a set of clients in {len(bitmap)} bytes that is none")
        return tuple(name for name in self.clients if bits >> (self.points[name] - 1) & 1)


@dataclass(frozen=True)
class Hello:
    """Step 0: a client's public keys of one round, and the fingerprint of its self seed."""

    client: str
    mask_public: bytes
    seal_public: bytes
    fingerprint: bytes

    def signed(self, context: bytes, identity: Identity) -> bytes:
        """The message, with the client's signature."""
        fields = (context, self.mask_public, self.seal_public, self.fingerprint)
        return frame("masked hello", *fields, identity.sign("masked hello", *fields))

    @classmethod
    def verified(cls, data: bytes, client: str, group: Group, context: bytes) -> Self:
        """``BadMessage`` naming the client unless it signed this for this round."""
        *fields, signature = unframe("masked hello", 5, data, client)
        if fields[0] != context:
            raise BadMessage(client, "its round keys belong to another round or group")
        if any(len(part) != _KEY_BYTES for part in fields[1:]):
            raise BadMessage(client, "its round keys have the wrong length")
        group.roster.verify(client, "masked hello", fields, signature)
        return cls(client, *fields[1:])


@dataclass(frozen=True)
class View:
    """End of step 1: whom a client pairs with, and under which keys. It signs this once.

    Attributes:
        sharers: who dealt shares, as this client was told, itself included; sorted.
        transcript: digest of all hellos of the sharers.
    """

    sharers: tuple[str, ...]
    transcript: bytes

    def fields(self, group: Group, context: bytes) -> tuple[bytes, ...]:
        """What its signature covers."""
        return context, group.bitmap(self.sharers), self.transcript


@dataclass(frozen=True)
class Survivors:
    """Step 3: what the clients consent to. One per round, the same for all.

    Attributes:
        sharers: who dealt shares, sorted: the clients whose masks can be recovered.
        survivors: whose uploads are in the sum, sorted; a subset.
        transcript: digest of all hellos of the sharers.
    """

    sharers: tuple[str, ...]
    survivors: tuple[str, ...]
    transcript: bytes

    @property
    def view(self) -> View:
        """What every survivor must have signed before it masked its integers."""
        return View(self.sharers, self.transcript)

    def fields(self, group: Group, context: bytes) -> tuple[bytes, ...]:
        """What a consent signs."""
        return (
            context,
            group.bitmap(self.sharers),
            group.bitmap(self.survivors),
            self.transcript,
        )

    def to_bytes(self, group: Group, context: bytes) -> bytes:
        """The message."""
        return frame("masked survive", *self.fields(group, context))

    @classmethod
    def from_bytes(cls, data: bytes, group: Group, context: bytes) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming the server otherwise."""
        found, sharers, survivors, transcript = unframe("masked survive", 4, data, SERVER)
        if found != context:
            raise BadMessage(SERVER, "its survivors belong to another round or group")
        made = cls(group.named(sharers, SERVER), group.named(survivors, SERVER), transcript)
        if not set(made.survivors) <= set(made.sharers):
            raise BadMessage(SERVER, "survivors that never dealt shares")
        return made


@dataclass(frozen=True)
class Request:
    """Step 3: what the clients are shown before they reveal anything."""

    survivors: bytes
    consents: dict[str, bytes]

    def to_bytes(self, group: Group) -> bytes:
        """The message."""
        names = sorted(self.consents)
        signatures = b"".join(self.consents[name] for name in names)
        return frame("masked request", self.survivors, group.bitmap(names), signatures)

    @classmethod
    def from_bytes(cls, data: bytes, group: Group) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming the server otherwise."""
        survivors, names, signatures = unframe("masked request", 3, data, SERVER)
        signers = group.named(names, SERVER)
        if len(signatures) != SIGNATURE_BYTES * len(signers):
            raise BadMessage(SERVER, f"{len(signers)} signers and {len(signatures)} bytes of them")
        starts = range(0, len(signatures), SIGNATURE_BYTES)
        parts = [signatures[at : at + SIGNATURE_BYTES] for at in starts]
        return cls(survivors, dict(zip(signers, parts, strict=True)))


@dataclass(frozen=True)
class Reveal:
    """Step 3: one share per sharer, in the order of their names."""

    shares: tuple[bytes, ...]

    def signed(self, survivors: bytes, identity: Identity) -> bytes:
        """The message, with the client's signature on it and on the survivors it is for."""
        body = b"".join(self.shares)
        signature = identity.sign("masked reveal", survivors, body)
        return frame("masked reveal", body, signature)

    @classmethod
    def verified(
        cls, data: bytes, client: str, group: Group, survivors: bytes, sharers: int
    ) -> Self:
        """``BadMessage`` naming the client unless it signed this for these survivors."""
        body, signature = unframe("masked reveal", 2, data, client)
        if len(body) != SHARE_BYTES * sharers:
            raise BadMessage(
                client,
                f"{len(body)} bytes of shares where one share of each of {sharers} clients was "
                "expected",
            )
        group.roster.verify(client, "masked reveal", (survivors, body), signature)
        parts = tuple(body[at : at + SHARE_BYTES] for at in range(0, len(body), SHARE_BYTES))
        if not all(is_share(part) for part in parts):
            raise BadMessage(client, "a share that is no element of the field")
        return cls(parts)


def transcript(hellos: Iterable[bytes]) -> bytes:
    """32 bytes that name exactly these hellos, given in the order of their clients' names."""
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in hellos)).digest()
