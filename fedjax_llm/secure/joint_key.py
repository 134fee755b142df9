"""The public result of a key ceremony: whose key it is, and how to know that it is theirs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fedjax_llm.errors import Refused
from fedjax_llm.secure import byte_lists
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.residues import Residues, pack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import BadMessage

_EPOCH_BYTES = 16


@dataclass(frozen=True)
class Group:
    """The clouds, in the order of their Shamir points 1..n, and how many must act together."""

    clouds: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        """Refuses groups in which one cloud alone could decrypt."""
        if len(set(self.clouds)) != len(self.clouds) or not all(self.clouds):
            raise Refused(f"clouds must have distinct names, got {list(self.clouds)}")
        if not all(name.isprintable() for name in self.clouds):
            raise Refused(f"clouds' names must be printable, got {list(self.clouds)}")
        if not 2 <= self.threshold <= len(self.clouds):
            raise Refused(
                f"threshold must be in [2, {len(self.clouds)}] for {len(self.clouds)} clouds, got "
                f"{self.threshold}: below 2, one cloud alone could decrypt"
            )

    def point(self, cloud: str) -> int:
        """The Shamir point of a cloud."""
        return self.clouds.index(cloud) + 1

    def to_bytes(self) -> bytes:
        """Injective."""
        names = byte_lists.join_names(self.clouds)
        return frame("group", self.threshold.to_bytes(8, "little"), names)

    @classmethod
    def from_bytes(cls, data: bytes, sender: str) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` naming ``sender`` for anything else."""
        threshold, names = unframe("group", 2, data, sender)
        if len(threshold) != 8:
            raise BadMessage(sender, f"no group (a threshold of {len(threshold)} bytes, not 8)")
        try:
            return cls(byte_lists.split_names(names, sender), int.from_bytes(threshold, "little"))
        except Refused as err:
            raise BadMessage(sender, f"no group ({err})") from err


@dataclass(frozen=True, eq=False)
class JointKey:
    """What everyone may know.

    Attributes:
        residues_2LN: the public key (b, a).
        digest: SHA-256 that names key, seed, group and scheme.
        seed: 32 bytes of public randomness that no party could choose, for public polynomials.
    """

    residues_2LN: Residues
    digest: bytes
    seed: bytes

    @classmethod
    def of(cls, residues_2LN: Residues, seed: bytes, group: Group, scheme: Scheme) -> Self:
        """The key with its digest."""
        packed = pack(residues_2LN, scheme.moduli)
        named = frame("joint key", scheme.digest(), group.to_bytes(), seed, packed)
        return cls(residues_2LN, hashlib.sha256(named).digest(), seed)

    @property
    def epoch(self) -> bytes:
        """16 bytes by which messages name the key that they are under."""
        return self.digest[:_EPOCH_BYTES]


def confirmation(key: JointKey, group: Group, roster: Roster, identity: Identity) -> bytes:
    """A cloud's word that it holds a share of this key, dealt among these clouds."""
    return frame("confirm", identity.sign("joint key", *_confirmed(key, group, roster)))


def check_confirmations(
    key: JointKey,
    group: Group,
    scheme: Scheme,
    roster: Roster,
    confirmations: Mapping[str, bytes],
) -> None:
    """For clouds and clients: is this key the one that all clouds of the group have made?

    Formal guarantee: given an authentic roster and group, passing means that every honest cloud of
    the group has confirmed exactly this key, group, scheme and seed, at some time. Whoever relays
    all this must not be the one who says what the group and the current epoch are:

    | not authentic | what passes |
    |---|---|
    | the roster | keys of invented clouds |
    | the group | a key of any group out of the roster, such as two clients that work together |
    | the epoch | an old key of the right group, whose shares may not have been forgotten |

    Raises:
        Refused: no confirmation of some cloud, or the digest is not the key's.
        BadMessage: naming the cloud whose confirmation is damaged, forged or of something else.
    """
    if JointKey.of(key.residues_2LN, key.seed, group, scheme).digest != key.digest:
        raise Refused("the joint key is not the one that its epoch names; ask the clouds for it")
    check_senders("confirm", confirmations, group.clouds)
    for name in group.clouds:
        (signature,) = unframe("confirm", 1, confirmations[name], name)
        roster.verify(name, "joint key", _confirmed(key, group, roster), signature)


def check_senders(step: str, messages: Mapping[str, bytes], senders: Sequence[str]) -> None:
    """One message of each, and of nobody else."""
    missing = sorted(set(senders) - set(messages))
    if missing:
        raise Refused(f"key ceremony: no {step!r} message from {', '.join(missing)}; start again")
    for stranger in sorted(set(messages) - set(senders)):
        raise BadMessage(stranger, f"no {step!r} message is expected from it")


def _confirmed(key: JointKey, group: Group, roster: Roster) -> tuple[bytes, bytes, bytes]:
    # Of a larger roster, only the clouds' part: clients come and go.
    clouds = Roster(roster[name] for name in group.clouds)
    return key.digest, group.to_bytes(), clouds.digest()
