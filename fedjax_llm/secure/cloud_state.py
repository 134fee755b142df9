"""What a cloud keeps between rounds, in memory and in its key file.

One file per cloud (layout: ``key_file``), with these fields behind the version:

| field | content |
|---|---|
| identity | the cloud's private signing and exchange keys |
| roster, group | all clouds' public identities; their order and the threshold |
| minimum clients | uint64, at least 1 |
| scheme | 16 bytes that name the parameters |
| epoch, seed, key | of the joint public key, and its packed residues |
| share | this cloud's packed Shamir share of the joint secret |
| mask keys | 32 bytes per other cloud, in the group's order |
| journal | round + 1 (uint64), fresh answers given (uint8), digest of that round's total |
| confirmations | every cloud's signature over the joint key |
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

from fedjax_llm.errors import UserError
from fedjax_llm.secure import byte_lists, key_file
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.joint_key import Group, JointKey, check_confirmations
from fedjax_llm.secure.key_ceremony import Outcome
from fedjax_llm.secure.residues import pack, unpack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import BadMessage

_KIND = "cloud key file"
_JOURNAL = struct.Struct("<QB32s")


@dataclass(frozen=True)
class Member:
    """Who a cloud is and whom it works with; the same before and after a rotation of keys.

    Attributes:
        identity: its own keys.
        roster: the public identities of all clouds of the group.
        group: the clouds and their threshold.
        minimum_clients: fewest clients whose sum it helps to decrypt.
    """

    identity: Identity
    roster: Roster
    group: Group
    minimum_clients: int


@dataclass(frozen=True)
class Journal:
    """What a cloud has bound itself to: one total of one round, and how often it answered for it.

    The name of nothing, at first, is 32 zero bytes.
    """

    round_number: int = -1
    total: bytes = bytes(32)
    answers: int = field(default=0)


def save(path: Path, scheme: Scheme, member: Member, keys: Outcome, journal: Journal) -> None:
    """Replaces the cloud's key file; it is on the disk when this returns."""
    others = [name for name in member.group.clouds if name != member.identity.name]
    confirmations = [keys.confirmations[name] for name in member.group.clouds]
    fields = [
        member.identity.to_bytes(),
        member.roster.to_bytes(),
        member.group.to_bytes(),
        member.minimum_clients.to_bytes(8, "little"),
        scheme.digest(),
        keys.key.epoch,
        keys.key.seed,
        pack(keys.key.residues_2LN, scheme.moduli),
        pack(keys.share_1LN, scheme.moduli),
        b"".join(keys.mask_keys[name] for name in others),
        _JOURNAL.pack(journal.round_number + 1, journal.answers, journal.total),
        byte_lists.join(confirmations),
    ]
    key_file.write(path, _KIND, fields)


def load(path: Path, scheme: Scheme) -> tuple[Member, Outcome, Journal]:
    """The inverse of ``save``.

    Raises:
        UserError: naming the file and the cure: it is not owner-only, damaged, foreign, or made
            for other parameters.
    """
    fields = key_file.read(path, _KIND, 12)
    if fields[4] != scheme.digest():
        raise UserError(
            f"key file {path} was made for other parameters of the encrypted sum than this run's; "
            "use the run file that it was made with, or make new keys in an empty folder"
        )
    with key_file.contents_of(path):
        return _opened(fields, scheme, str(path))


def _opened(fields: list[bytes], scheme: Scheme, path: str) -> tuple[Member, Outcome, Journal]:
    identity, roster, group, minimum, _, epoch, seed, public, share, masks, journal, words = fields
    moduli, size = scheme.moduli, scheme.ring_dimension
    fewest = int.from_bytes(minimum, "little") if len(minimum) == 8 else 0
    if fewest < 1:
        raise BadMessage(path, "its smallest number of clients is no uint64 of 1 or more")
    member = Member(
        Identity.from_bytes(identity, path),
        Roster.from_bytes(roster, path),
        Group.from_bytes(group, path),
        fewest,
    )
    residues_2LN = unpack(public, 2, moduli, size, path)
    key = JointKey.of(residues_2LN, seed, member.group, scheme)
    own, clouds = member.identity.name, member.group.clouds
    found = byte_lists.split(words, path)
    if len(found) != len(clouds):
        raise BadMessage(path, f"it has {len(found)} confirmations of {len(clouds)} clouds")
    confirmations = dict(zip(clouds, found, strict=True))
    check_confirmations(key, member.group, scheme, member.roster, confirmations)
    others = [name for name in clouds if name != own]
    if (
        key.epoch != epoch
        or own not in clouds
        or member.roster[own] != member.identity.public
        or len(masks) != 32 * len(others)
        or len(journal) != _JOURNAL.size
    ):
        raise BadMessage(path, "its parts do not belong together")
    mask_keys = {name: masks[32 * at : 32 * at + 32] for at, name in enumerate(others)}
    keys = Outcome(key, unpack(share, 1, moduli, size, path), mask_keys, confirmations)
    round_number, answers, total = _JOURNAL.unpack(journal)
    return member, keys, Journal(round_number - 1, total, answers)
