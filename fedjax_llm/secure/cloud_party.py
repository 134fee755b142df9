"""A cloud that holds a share of the joint secret and helps to decrypt sums.

Why partial decryptions add up. Let sigma_j be cloud j's Shamir share and lambda_j its weight in the
decrypting set S, so that sum over S of lambda_j sigma_j = s modulo every limb's prime, hence modulo
Q. Cloud j answers lambda_j sigma_j c_1 + e_j. The weights are large numbers modulo Q, but each is
multiplied in *before* the flooding error e_j is added: the answers add up to c_1 s + sum of e_j,
with the same error as if every cloud held an additive share. Nobody's key is rebuilt, and a cloud
that is absent reveals nothing.

| symbol | meaning |
|---|---|
| n, t, c | clouds; how many decrypt; how many are in league with the server, at most t - 1 |
| E | noise of the summed ciphertext: c_0 + c_1 s = message + E |
| W | width of the flooding: e_j is uniform over an interval of that many integers |
| delta | E N / W: distance between e_j and E + e_j over all N coefficients |

With BFV, E < 2^50 (below 2^25 in practice) and W = Q / q_0 > 2^119, so that delta < 2^-53 (2^-80)
at N up to 16384. What CKKS adds is stated in ``ckks``.

One set. To each answer the clouds of S add masks that cancel over S (``masks``), so that of the
honest clouds' answers nothing but their sum is seen, whoever the at most t - 1 others are, in S or
not, and however much larger than t the set is. In it the honest clouds' weights and what the
others know combine to slope one: it is c_1 s, what the others can compute, and the sum of
the honest clouds' e_j. With c_0 it shows E plus at least one e_j, which is within delta of e_j
alone. If an honest cloud of S does not answer, the answers of the rest are uniform.

Several answers for one total. A cloud that dies after the set was fixed must not cost the round,
so a cloud answers up to three times for the *same* c_1, with fresh flooding: for other sets, or
for the same set when it has been restarted and lost the bytes.

- A set that stays unfinished adds nothing: masks are keyed by the statement, which names the set,
  so that those of two sets are independent, and each set's answers are uniform on their own.
- A late answer that finishes a second set shows E + F_1 and E + F_2 with independent F: the
  message is the same, so their difference holds no client's part. Distances add: 2 delta.
- The same set answered twice: masks repeat. Give the other e_j away; what one honest cloud has
  added r times is E + e^1, ..., E + e^r and the masked part, within r delta.
- In all: take one honest cloud per finished set, that with the fewest answers. A cloud gives three
  in a round, a finished set holds at least t - c honest ones of the n - c, so that the sum of
  these counts is at most 3 (n - c) / (t - c) <= 3 (n - t + 1).

Formal guarantee. What server and c <= t - 1 clouds see of a round is within 3 (n - t + 1) delta
per ciphertext of something computed from the decrypted total and their own shares; with a server
that follows the protocol, which tries three sets, within 3 delta (below 2^-51 per ciphertext, 2^-78
in practice). Rounds add up. SHAKE-256 and gap Diffie-Hellman as in ``masks``.

Averaging. Of uniform errors the mean is not even the best: the extremes of m answers locate E to
about W / m. To tell two values of E apart takes m near 1 / delta, 2^53 fresh answers for the same
c_1 at worst; there are three, and after them the cloud refuses. The same c_1 under the numbers of
later rounds is a further round each, and counted as such above.

| request | answer |
|---|---|
| to sign another total for a round signed before, or for an earlier round | ``Refused`` |
| to sign another set for the same total | signed: a signature shows nothing of the key |
| the statement last answered, again | the same bytes again |
| another set for the same total, or an older one again | a fresh answer, three in all |
| a fourth fresh answer | ``Refused`` |
| a statement that not all of the set have signed, or another c_1 than it names | ``BadMessage`` |
| a set without this cloud, with a stranger, repeated, or of fewer than t clouds | ``Refused`` |
| fewer participants than ``minimum_clients`` | ``Refused`` |
| while another request is being served | waits for it |
| anything after ``close``, or in a process forked since the set-up | ``Refused`` |

Two *totals* in one round would give the difference of two sums: single clients' contributions.
What is signed and answered is in the key file, if there is one, before a byte leaves the cloud:
restarted, it is bound as before. What a malicious server can still do is in ``decryption``.

The lock of the key file (``key_file.Lock``) holds this for one object per file. A closed party has
let go of it, and a forked child shares its parent's without knowing what the parent answers: both
would write over another's journal, so neither does anything more.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import quote

import numpy as np

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import cloud_state, key_file, shamir
from fedjax_llm.secure.cloud_state import Journal, Member
from fedjax_llm.secure.decryption import MAX_ANSWERS, SERVER, Statement, open_request
from fedjax_llm.secure.frames import frame
from fedjax_llm.secure.key_ceremony import Ceremony, JointKey, Outcome
from fedjax_llm.secure.masks import mask
from fedjax_llm.secure.residues import Residues, add, pack, packed_bytes, unpack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import BadMessage


def file_of(folder: Path, cloud: str) -> Path:
    """Where the cloud of this name keeps its keys."""
    return folder / f"{quote(cloud, safe='')}.key"


class CloudParty:
    """Holds secrets; everything that leaves it is bytes."""

    def __init__(self, scheme: Scheme, member: Member, folder: Path | None = None) -> None:
        """Nothing but the identity is secret yet; run the key ceremony next.

        Args:
            scheme: of the ciphertexts.
            member: who this cloud is, and its group.
            folder: where to keep the keys; None keeps them in memory, and the cloud's word to
                decrypt one total per round lasts as long as the object.

        Raises:
            UserError: the folder holds keys of this cloud, or another process uses them.
        """
        if member.minimum_clients < 1:
            raise UserError(f"minimum_clients must be at least 1, got {member.minimum_clients}")
        path = None if folder is None else file_of(folder, member.identity.name)
        lock = None if path is None else key_file.Lock(path)
        self._set_up(scheme, member, path, lock)
        try:
            if path is not None and path.exists():
                raise UserError(f"{path} holds keys already; open them, or give an empty folder")
            self.rotate()
        except BaseException:
            self.close()
            raise

    def _set_up(
        self, scheme: Scheme, member: Member, path: Path | None, lock: key_file.Lock | None
    ) -> None:
        self._scheme, self._member, self._path, self._lock = scheme, member, path, lock
        self._ceremony: Ceremony | None = None
        self._keys: Outcome | None = None
        self._journal = Journal()
        # Two requests at once could otherwise both pass as the first one of their round.
        self._one_at_a_time = threading.Lock()
        self._last_answer: tuple[bytes, bytes] = (b"", b"")
        self._process, self._closed = os.getpid(), False

    @classmethod
    def load(cls, path: Path, scheme: Scheme) -> Self:
        """The cloud as it was when it last signed or answered.

        Raises:
            UserError: naming the file and the cure; see ``cloud_state.load``.
        """
        party = cls.__new__(cls)
        lock = key_file.Lock(path)
        try:
            member, keys, journal = cloud_state.load(path, scheme)
        except BaseException:
            lock.close()
            raise
        party._set_up(scheme, member, path, lock)
        party._keys, party._journal = keys, journal
        return party

    def close(self) -> None:
        """Forgets the keys and lets go of the key file, so that another process may open it.

        Afterwards the party refuses everything: the file may be another's by then.
        """
        with self._one_at_a_time:
            self._closed = True
            self._keys = self._ceremony = None
            self._last_answer = (b"", b"")
            if self._lock is not None:
                self._lock.close()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """One request at a time, and only while the key file is this object's alone."""
        # Before the lock: a child may have been forked while another thread held it.
        if os.getpid() != self._process:
            raise Refused(
                f"cloud {self.cloud!r} was set up before this process was forked, which would "
                "let it answer twice for a round; start processes with 'spawn' and set up the sum "
                "in each"
            )
        with self._one_at_a_time:
            self._refuse_closed()
            yield

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Refused(f"cloud {self.cloud!r} is closed; open its key file again")

    @property
    def cloud(self) -> str:
        """Its name."""
        return self._member.identity.name

    @property
    def member(self) -> Member:
        """Who it is, and its group."""
        return self._member

    @property
    def ceremony(self) -> Ceremony:
        """This cloud's side of the ceremony that is going on."""
        self._refuse_closed()
        if self._ceremony is None:
            raise Refused(f"cloud {self.cloud!r} has already finished its key ceremony")
        return self._ceremony

    @property
    def key(self) -> JointKey:
        """The joint public key of which this cloud holds a share."""
        return self._held.key

    @property
    def confirmations(self) -> dict[str, bytes]:
        """Every cloud's signature over that key, for ``joint_key.check_confirmations``."""
        return dict(self._held.confirmations)

    @property
    def _held(self) -> Outcome:
        self._refuse_closed()
        if self._keys is None:
            raise Refused(f"cloud {self.cloud!r} holds no key share; run the key ceremony first")
        return self._keys

    def rotate(self) -> None:
        """Starts a new ceremony. Until it is finished, the keys of before serve."""
        with self._serving():
            member = self._member
            self._ceremony = Ceremony(self._scheme, member.group, member.identity, member.roster)

    def finish(self, confirmations: Mapping[str, bytes]) -> None:
        """Ends the ceremony: new keys, the old ones and all secrets of the ceremony forgotten.

        The round numbers of before stay closed under the new keys.
        """
        with self._serving():
            keys = self.ceremony.finish(confirmations)
            if self._path is not None:
                cloud_state.save(self._path, self._scheme, self._member, keys, self._journal)
            self._keys, self._ceremony, self._last_answer = keys, None, (b"", b"")

    def agree(self, statement: bytes) -> bytes:
        """Signs that this set decrypts this total; refusals as in the module's table."""
        with self._serving():
            asked = Statement.from_bytes(statement)
            self._bind(asked)
            return frame("agreed", self._member.identity.sign("statement", asked.digest()))

    def partial_decryption(self, request: bytes) -> bytes:
        """This cloud's part in decrypting one round's total: refusals as in the module's table."""
        with self._serving():
            statement, c1 = open_request(request, self._member.roster)
            self._bind(statement)
            digest = statement.digest()
            if digest == self._last_answer[0]:
                return self._last_answer[1]
            if self._journal.answers >= MAX_ANSWERS:
                raise Refused(
                    f"cloud {self.cloud!r} has answered {MAX_ANSWERS} times for round "
                    f"{statement.total.round_number}; repeat the uploads of the same clients under "
                    "a new round number"
                )
            body = self._answer(statement.clouds, c1, digest)
            signed = [digest, hashlib.sha256(body).digest()]
            signature = self._member.identity.sign("partial decryption", *signed)
            answer = frame("partial", digest, body, signature)
            before = self._journal
            self._record(Journal(before.round_number, before.total, before.answers + 1))
            self._last_answer = (digest, answer)
            return answer

    def _bind(self, statement: Statement) -> None:
        """Refuses, or binds this cloud to the statement's total for its round."""
        total, member, held = statement.total, self._member, self._held
        if total.epoch != held.key.epoch:
            raise BadMessage(SERVER, "it asks to decrypt under other keys than this run's")
        clouds, group = statement.clouds, member.group
        if (
            self.cloud not in clouds
            or len(set(clouds)) != len(clouds)
            or not set(clouds) <= set(group.clouds)
            or len(clouds) < group.threshold
        ):
            raise Refused(
                f"cloud {self.cloud!r} decrypts with {group.threshold} or more of "
                f"{', '.join(group.clouds)}, itself included, not with {', '.join(clouds)}"
            )
        if len(total.participants) < member.minimum_clients:
            raise Refused(
                f"cloud {self.cloud!r} decrypts sums of {member.minimum_clients} or more clients, "
                f"asked for one of {len(total.participants)}"
            )
        bound = self._journal
        if (total.round_number, total.digest()) == (bound.round_number, bound.total):
            return
        if total.round_number <= bound.round_number:
            raise Refused(
                f"cloud {self.cloud!r} is bound to one sum of round {bound.round_number} and "
                f"decrypts no other for round {total.round_number}: two would reveal differences; "
                "repeat the uploads under a new round number"
            )
        self._record(Journal(total.round_number, total.digest()))

    def _record(self, journal: Journal) -> None:
        """On the disk first: a cloud that is killed now must not forget what it has promised."""
        if self._path is not None:
            cloud_state.save(self._path, self._scheme, self._member, self._held, journal)
        self._journal = journal

    def _answer(self, clouds: tuple[str, ...], c1: bytes, digest: bytes) -> bytes:
        """The packed partial decryption of every ciphertext."""
        moduli, size = self._scheme.moduli, self._scheme.ring_dimension
        weighted_1LN = self._weighted(clouds)
        one = packed_bytes(moduli, size)
        if not c1 or len(c1) % one:
            raise BadMessage(SERVER, "the ciphertexts to decrypt have the wrong length")
        parts = []
        for number, at in enumerate(range(0, len(c1), one)):
            c1_1LN = unpack(c1[at : at + one], 1, moduli, size, SERVER)
            flooded = self._scheme.decrypt_partially(weighted_1LN, c1_1LN)
            keys = self._held.mask_keys
            hiding = mask(self.cloud, clouds, keys, digest, number, moduli, size)
            parts.append(pack(add(flooded, hiding, moduli), moduli))
        return b"".join(parts)

    def _weighted(self, clouds: tuple[str, ...]) -> Residues:
        """lambda_j sigma_j: this cloud's share times its weight in the set."""
        points = [self._member.group.point(name) for name in clouds]
        own = self._member.group.point(self.cloud)
        rows = zip(self._held.share_1LN[0], self._scheme.moduli, strict=True)
        return np.stack(
            [shamir.scale(row, shamir.lagrange_at_zero(points, q)[own], q) for row, q in rows]
        )[None]
