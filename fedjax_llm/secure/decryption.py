"""How the server and t clouds decrypt one total: a statement that all sign, then the answers.

1. The server names the total (epoch, round, participants, digests of c_0 and c_1) and the
   decrypting set: the ``Statement``. Each cloud of the set signs it.
2. The server sends statement, all signatures and c_1. A cloud checks that the whole set signed
   this very statement and that c_1 is the one it names, and answers with its partial decryption,
   flooded, masked and signed (``cloud_party``).
3. The server adds the answers to c_0. All clouds do the same; there is no lead whose answer
   would have to be among them, for c_0 stays with the server.

A cloud that does not answer, to the first or to the second, raises ``NoAnswer``, and the server
goes on with another set, for the same total.

What signatures add against a malicious server, given an authentic roster:

- It cannot speak for a cloud: not in the key ceremony, so that it holds no share and no mask key,
  and not here.
- It cannot have two totals of one round decrypted through sets that share an honest cloud: that
  cloud signs and answers for one. Two sets of t out of n share at least 2t - n clouds, so that
  with c clouds in league with the server there is one total per round if 2t - n > c.
- A cloud that signs two totals for one round, or a server that asks for two, leaves proof.

What is left to it: with 2t - n <= c, two sets and two totals in one round, hence a difference of
sums. Whatever t and n: the clouds cannot see what was added. It can name participants who sent
nothing, count one client's ciphertext as the sum, and hand over a crafted c_1 (the constant
Q / 4), whose "decryption" shows the upper bits of the joint secret. Against that helps only a
proof of correct addition, which is not here.

Who asks is not checked here. A statement is not signed by the server and binds the cloud that it
reaches: one for round 2^63 - 1 closes that cloud for ever, through rotations too. This costs
availability, nothing else. Clouds must take requests only over a channel on which the server has
authenticated itself (mutual TLS, for one); a malicious server can close them whatever the channel.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from fedjax_llm.errors import Refused
from fedjax_llm.secure import byte_lists
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Roster
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, Costs, NoAnswer, checked_round

SERVER = "the server"
# Fresh answers of one cloud for one total, and sets that the server tries: see ``cloud_party``.
MAX_ANSWERS = 3


@dataclass(frozen=True)
class Total:
    """What may be decrypted once per round.

    Attributes:
        epoch: 16 bytes, names the joint key.
        round_number: in [0, 2^63).
        participants: the clients in the sum, sorted, each once.
        c0_digest: SHA-256 of the packed c_0 of all ciphertexts.
        c1_digest: SHA-256 of the packed c_1 of all ciphertexts.
    """

    epoch: bytes
    round_number: int
    participants: tuple[str, ...]
    c0_digest: bytes
    c1_digest: bytes

    def __post_init__(self) -> None:
        """Refuses what has no unique form."""
        object.__setattr__(self, "round_number", checked_round(self.round_number))
        if list(self.participants) != sorted(set(self.participants)):
            raise Refused(
                f"participants must be sorted and distinct, got {list(self.participants)}"
            )
        if (len(self.epoch), len(self.c0_digest), len(self.c1_digest)) != (16, 32, 32):
            raise Refused("an epoch has 16 bytes, the digests of c_0 and c_1 have 32 each")

    @classmethod
    def of(
        cls, epoch: bytes, round_number: int, participants: Iterable[str], c0: bytes, c1: bytes
    ) -> Self:
        """The name of a server's sum."""
        digests = hashlib.sha256(c0).digest(), hashlib.sha256(c1).digest()
        return cls(epoch, round_number, tuple(sorted(participants)), *digests)

    def to_bytes(self) -> bytes:
        """Injective."""
        number = self.round_number.to_bytes(8, "little")
        names = byte_lists.join_names(self.participants)
        return frame("total", self.epoch, number, names, self.c0_digest, self.c1_digest)

    def digest(self) -> bytes:
        """32 bytes that name this total."""
        return hashlib.sha256(self.to_bytes()).digest()


@dataclass(frozen=True)
class Statement:
    """A total and the clouds that decrypt it together, in the order in which they were asked."""

    total: Total
    clouds: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Injective; what is sent to each cloud of the set."""
        return frame("statement", self.total.to_bytes(), byte_lists.join_names(self.clouds))

    def digest(self) -> bytes:
        """32 bytes that name this statement."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of ``to_bytes``; ``BadMessage`` for anything else."""
        total, clouds = unframe("statement", 2, data, SERVER)
        epoch, number, names, c0_digest, c1_digest = unframe("total", 5, total, SERVER)
        if len(number) != 8:
            raise BadMessage(SERVER, "a round number of another length")
        participants = byte_lists.split_names(names, SERVER)
        round_number = int.from_bytes(number, "little")
        try:
            named = Total(epoch, round_number, participants, c0_digest, c1_digest)
        except Refused as err:
            raise BadMessage(SERVER, str(err)) from err
        return cls(named, byte_lists.split_names(clouds, SERVER))


class CloudLike(Protocol):
    """A cloud as the server sees it: a ``CloudParty``, or a connection to one."""

    def agree(self, statement: bytes) -> bytes:
        """The cloud's signature of a statement; raises ``NoAnswer`` if it cannot be reached."""

    def partial_decryption(self, request: bytes) -> bytes:
        """The cloud's part of a decryption; raises ``NoAnswer`` if it cannot be reached."""


def request_bytes(statement: Statement, signatures: Mapping[str, bytes], c1: bytes) -> bytes:
    """What the server sends to every cloud of the set, the same bytes to each."""
    joined = byte_lists.join(signatures[name] for name in statement.clouds)
    return frame("decrypt", statement.to_bytes(), joined, c1)


def open_request(request: bytes, roster: Roster) -> tuple[Statement, bytes]:
    """At a cloud: the statement, signed by its whole set, and the c_1 that it names.

    Raises:
        BadMessage: naming the cloud whose signature is not valid, or the server.
    """
    data, joined, c1 = unframe("decrypt", 3, request, SERVER)
    statement = Statement.from_bytes(data)
    signatures = byte_lists.split(joined, SERVER)
    if len(signatures) != len(statement.clouds):
        raise BadMessage(SERVER, "not every cloud of the set has signed the statement")
    for name, signature in zip(statement.clouds, signatures, strict=True):
        roster.verify(name, "statement", [statement.digest()], signature)
    if hashlib.sha256(c1).digest() != statement.total.c1_digest:
        raise BadMessage(SERVER, "c_1 is not the one that the statement names")
    return statement, c1


def open_agreement(statement: Statement, cloud: str, data: bytes, roster: Roster) -> bytes:
    """At the server: a cloud's signature of the statement.

    Raises:
        BadMessage: naming the cloud: damaged, forged, or of another statement.
    """
    (signature,) = unframe("agreed", 1, data, cloud)
    roster.verify(cloud, "statement", [statement.digest()], signature)
    return signature


def open_answers(
    statement: Statement, answers: Mapping[str, bytes], roster: Roster
) -> dict[str, bytes]:
    """At the server: the packed partial decryptions of exactly the decrypting set.

    | answers | behaviour |
    |---|---|
    | none of some cloud of the set | ``NoAnswer``, naming the first |
    | one from outside of the set | ``BadMessage``, naming it |
    | another cloud's answer, or one for another statement, in a cloud's name | ``BadMessage`` |
    | damaged | ``BadMessage`` |
    """
    for cloud in statement.clouds:
        if cloud not in answers:
            raise NoAnswer(cloud, f"its part of round {statement.total.round_number} is missing")
    opened = {}
    for cloud, data in answers.items():
        if cloud not in statement.clouds:
            raise BadMessage(cloud, "a stranger to the decrypting set")
        found, body, signature = unframe("partial", 3, data, cloud)
        if found != statement.digest():
            raise BadMessage(cloud, "its answer is for another statement")
        signed = [found, hashlib.sha256(body).digest()]
        roster.verify(cloud, "partial decryption", signed, signature)
        opened[cloud] = body
    return opened


def decrypt(
    total: Total,
    c1: bytes,
    parties: Mapping[str, CloudLike],
    roster: Roster,
    threshold: int,
    alive: Sequence[str],
    costs: Costs,
    run: Callable[..., Iterable[Any]] = map,
) -> dict[str, bytes]:
    """At the server: the whole exchange; another set is tried when a cloud does not answer.

    Args:
        total: what to decrypt.
        c1: packed, of all ciphertexts.
        parties: the clouds.
        roster: of the clouds.
        threshold: t.
        alive: the clouds that may be asked, the first t of them first.
        costs: bytes are added to it, those for sets that did not finish included.
        run: ``map`` or an executor's.

    Returns:
        cloud -> packed partial decryptions of all ciphertexts, of exactly one set.

    Raises:
        BelowThreshold: fewer than t clouds answer, or three sets did not finish.
        BadMessage: naming the cloud whose bytes are not what they should be.
        Refused: a cloud's own refusal.
    """
    left, silent = list(alive), list[NoAnswer]()

    def ask(name: str, call: Callable[[CloudLike], bytes], sent: int) -> bytes | None:
        costs.bytes_down[name] = costs.bytes_down.get(name, 0) + sent
        try:
            data = call(parties[name])
        except NoAnswer as err:
            silent.append(err)
            left.remove(name)
            return None
        costs.bytes_up[name] = costs.bytes_up.get(name, 0) + len(data)
        return data

    sets = 0
    while len(left) >= threshold and sets < MAX_ANSWERS:
        statement = Statement(total, tuple(left[:threshold]))
        asked = statement.to_bytes()

        def agree(name: str, asked: bytes = asked) -> bytes | None:
            return ask(name, lambda party: party.agree(asked), len(asked))

        agreed = {name: agree(name) for name in statement.clouds}
        signatures = {
            name: open_agreement(statement, name, data, roster)
            for name, data in agreed.items()
            if data is not None
        }
        if len(signatures) < threshold:
            continue  # nobody has answered yet: this set costs nothing
        sets += 1
        request = request_bytes(statement, signatures, c1)

        def answer(name: str, request: bytes = request) -> bytes | None:
            return ask(name, lambda party: party.partial_decryption(request), len(request))

        found = dict(zip(statement.clouds, run(answer, statement.clouds), strict=True))
        answers = {name: data for name, data in found.items() if data is not None}
        if len(answers) == threshold:
            return open_answers(statement, answers, roster)
    raise BelowThreshold(
        f"round {total.round_number}: decryption needs {threshold} clouds, "
        f"{'three sets failed' if sets == MAX_ANSWERS else f'{len(left)} left'} "
        f"({'; '.join(map(str, silent)) or 'no other was alive'}); start one of them again, or "
        "repeat the uploads of the same clients under a new round number"
    )
