"""A cloud that holds a share of the joint secret and helps to decrypt sums.

Why partial decryptions add up. Let sigma_j be cloud j's Shamir share and lambda_j its weight in the
decrypting set S, so that sum over S of lambda_j sigma_j = s modulo every limb's prime, hence modulo
Q. Cloud j answers lambda_j sigma_j c_1 + e_j. The weights are large numbers modulo Q, but each is
multiplied in *before* the flooding error e_j is added: the answers add up to c_1 s + sum of e_j,
with the same error as if every cloud held an additive share. Nobody's key is rebuilt, and a cloud
that is absent reveals nothing.

Formal guarantee. To each answer the clouds of S add masks that cancel over S (``masks``), so that
of the honest clouds' answers nothing but their sum is seen, whoever the at most t - 1 others are,
in S or not. That sum is the decrypted value and the ciphertext noise E < 2^50, minus what the
others compute themselves, plus at least one e_j, uniform over an interval of width
Q / q_0 > 2^119: it is within statistical distance 2 N E q_0 / Q < 2^-53 per ciphertext of one that
can be computed from the decrypted sum and the others' shares. (E is below 2^25 in practice, the
distance 2^-80.) Rounds add up: R rounds of C ciphertexts are within R C times that.

| request | answer |
|---|---|
| the same request again | the same bytes again: fresh noise on the same product would average out |
| another set, or another ciphertext, for a round already answered | ``Refused`` |
| a round before the last one answered | ``Refused`` |
| a request while another one is being answered | waits for it |
| a set without this cloud, with a stranger, or of fewer than t clouds | ``Refused`` |

Two sets in one round would give two multiples of the same product under different weights, and
two ciphertexts the difference of two sums: the contribution of single clients.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_llm.errors import Refused
from fedjax_llm.secure import shamir
from fedjax_llm.secure.bfv import Bfv
from fedjax_llm.secure.key_ceremony import Ceremony, Group, JointKey
from fedjax_llm.secure.masks import mask
from fedjax_llm.secure.residues import Residues, add, pack, packed_bytes, unpack
from fedjax_llm.secure.sums import BadMessage
from fedjax_llm.secure.wire import frame, unframe

SERVER = "the server"


def decrypt_request(
    round_number: int, epoch: bytes, clouds: Sequence[str], participants: int, c1: bytes
) -> bytes:
    """What the server asks of every cloud of the decrypting set; the same bytes to each."""
    numbers = round_number.to_bytes(8, "little") + participants.to_bytes(8, "little")
    return frame("decrypt", numbers, epoch, "\n".join(clouds).encode(), c1)


class CloudParty:
    """Holds secrets; everything that leaves it is bytes."""

    def __init__(self, bfv: Bfv, group: Group, cloud: str, minimum_clients: int) -> None:
        """Nothing is secret yet; run the key ceremony next."""
        self._bfv, self._group, self.cloud = bfv, group, cloud
        self._minimum_clients = minimum_clients
        self._ceremony: Ceremony | None = Ceremony(bfv, group, cloud)
        self._share: Residues | None = None
        self._key: JointKey | None = None
        self._mask_keys: dict[str, bytes] = {}
        # Two requests at once could otherwise both pass as the first one of their round.
        self._one_at_a_time = threading.Lock()
        self._answered_round = -1
        self._answered: tuple[bytes, bytes] = (b"", b"")

    @property
    def ceremony(self) -> Ceremony:
        """This cloud's side of the ceremony; gone once it is finished."""
        if self._ceremony is None:
            raise Refused(f"cloud {self.cloud!r} has already finished its key ceremony")
        return self._ceremony

    def finish(self, key: JointKey, deals: Mapping[str, bytes]) -> None:
        """Keeps the sum of the shares dealt to it, and forgets the ceremony's secrets."""
        self._share = self.ceremony.finish(key, deals)
        self._mask_keys = self.ceremony.mask_keys(key)
        self._key = key
        self._ceremony = None

    def partial_decryption(self, request: bytes) -> bytes:
        """This cloud's part in decrypting one round's sum.

        Raises:
            Refused: see the module's table; also a sum of fewer than ``minimum_clients``.
            BadMessage: the request is damaged or under other keys.
        """
        with self._one_at_a_time:
            return self._partial_decryption(request)

    def _partial_decryption(self, request: bytes) -> bytes:
        if self._share is None or self._key is None:
            raise Refused(f"cloud {self.cloud!r} holds no key share; run the key ceremony first")
        numbers, epoch, names, body = unframe("decrypt", 4, request, SERVER)
        if epoch != self._key.epoch or len(numbers) != 16:
            raise BadMessage(SERVER, "it asks to decrypt under other keys than this run's")
        round_number = int.from_bytes(numbers[:8], "little")
        participants = int.from_bytes(numbers[8:], "little")
        digest = hashlib.sha256(request).digest()
        if round_number == self._answered_round and digest == self._answered[0]:
            return self._answered[1]
        if round_number <= self._answered_round:
            raise Refused(
                f"cloud {self.cloud!r} has answered for round {self._answered_round} and decrypts "
                f"nothing else for round {round_number}: another set or sum would reveal "
                "differences; repeat the upload under a new round number"
            )
        clouds = names.decode("utf-8", "replace").split("\n")
        if (
            self.cloud not in clouds
            or len(set(clouds)) != len(clouds)
            or not set(clouds) <= set(self._group.clouds)
            or len(clouds) < self._group.threshold
        ):
            raise Refused(
                f"cloud {self.cloud!r} decrypts with {self._group.threshold} or more of "
                f"{', '.join(self._group.clouds)}, itself included, not with {', '.join(clouds)}"
            )
        if participants < self._minimum_clients:
            raise Refused(
                f"cloud {self.cloud!r} decrypts sums of {self._minimum_clients} or more clients, "
                f"asked for one of {participants}"
            )
        answer = self._answer(round_number, clouds, body, digest)
        self._answered_round, self._answered = round_number, (digest, answer)
        return answer

    def _answer(self, round_number: int, clouds: list[str], body: bytes, digest: bytes) -> bytes:
        assert self._share is not None and self._key is not None
        moduli, size = self._bfv.moduli, self._bfv.parameters.ring_dimension
        points = [self._group.point(name) for name in clouds]
        own = self._group.point(self.cloud)
        weighted = np.stack(
            [
                shamir.scale(row, shamir.lagrange_at_zero(points, modulus)[own], modulus)
                for row, modulus in zip(self._share[0], moduli, strict=True)
            ]
        )[None]
        one = packed_bytes(moduli, size)
        if not body or len(body) % one:
            raise BadMessage(SERVER, "the ciphertexts to decrypt have the wrong length")
        chunks = [body[at : at + one] for at in range(0, len(body), one)]
        parts = []
        for number, chunk in enumerate(chunks):
            c1 = unpack(chunk, 1, moduli, size, SERVER)
            flooded = self._bfv.decrypt_partially(weighted, c1)
            hiding = mask(self.cloud, clouds, self._mask_keys, digest, number, moduli, size)
            parts.append(pack(add(flooded, hiding, moduli), moduli))
        numbers = round_number.to_bytes(8, "little")
        return frame("partial", self.cloud.encode(), numbers, self._key.epoch, b"".join(parts))
