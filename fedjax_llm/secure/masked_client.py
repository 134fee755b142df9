"""A client of a masked sum during one round: its secrets, and what it refuses to reveal.

Let i be this client. b_i is its self seed, c_i the private key of its pair masks, n the group's
size, t its threshold, U the survivor set of the round.

Formal guarantee. Before a client masks anything it signs its view, once per round: whose shares
it was dealt, hence whom it pairs with, and all their keys. It signs one U per round, of at least
``minimum_clients`` members, each of which has signed the same view as itself. It reveals nothing
before it has seen t signatures on that U and view, and then one share per client: of b_j for j in
U, of c_j for the others. Hence, when c of the n clients work together with the server, which may
tell every client something else:

- One set. t clients sign each set for which an honest client reveals anything. Only the c helpers
  sign two, so that two such sets take 2 t <= n + c. With c < 2 t - n there is one U, and of each
  honest client one secret at most becomes known: every t - 1 shares are independent of theirs.
- One view. All honest members of U have signed the view of whoever reveals, so that each of them
  masks against all the others, under the keys that they have. None of these keys is revealed, for
  all of them are in U. So the server and its helpers learn the sum over the honest members of U,
  and nothing more; of the others, whose b_j stays hidden, nothing.
- That sum is of one client alone if U holds it and ``minimum_clients`` - 1 helpers. So it takes
  c >= min(2 t - n, ``minimum_clients`` - 1) helpers to see a client's integers, and these are
  enough, except that ``minimum_clients`` = n leaves no room for two sets (``Group.helpers``). Set
  ``minimum_clients`` to c + 2 or more, and t to more than (n + c) / 2. With t = n nobody may be
  missing at the end.
- If the server tells everyone the same, as one that follows the protocol does, there is one set
  and one view whatever t is, and all of this holds for c <= t - 1. t clients and the server can
  uncover any upload of their group, if the t break the rules.
- Without views, a server without helpers could tell one client that only t - 1 others dealt, and
  drop those: the shares of their c_j take all its pair masks away, and others would reveal its
  b_i. Without signatures on U, it could show each client another large U, chosen so that one
  client alone appears in t of them.

Assumptions: gap Diffie-Hellman on X25519 with HKDF-SHA256 as a random oracle, AES-256 as a
pseudorandom permutation, ChaCha20-Poly1305 as authenticated encryption, Ed25519 unforgeable,
SHA-256 as a random oracle, and that the roster names the right people.

| event | behaviour |
|---|---|
| fewer than t clients greet or deal | ``BelowThreshold``, naming who is missing |
| a hello, deal or signature that is not its sender's | ``BadMessage``, naming the sender |
| a second upload of the same integers | the same bytes again: tells nothing new |
| a second upload of other integers | ``Refused``: the difference would be in the clear |
| another U after one was signed | ``Refused`` |
| an upload after U was signed without it | ``Refused``: c_i may be known by now |
| U holds this client, which uploaded nothing | ``Refused`` |
| others dealt than this client was told | ``BadMessage``, naming the server |
| a member of U without a signature on this client's view | ``BadMessage``, naming the member |
| fewer than t valid signatures | ``Refused``, nothing revealed |
| the client restarts | its secrets are gone: for the others it has dropped out |

Source: Bonawitz et al., CCS 2017, section 4 (both masks, the signed survivor set) and section 6
(proofs, for a server that follows the protocol and for one that does not). Here a client that is
alive but was given up may consent and reveal as well, so that few uploads among many clients can
be summed. The t that consent then need not be in U, and a member of U may never be asked: that is
why its view must be signed.
"""

import hashlib
import secrets
import threading
from collections.abc import Iterator, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure import masked_shares
from fedjax_llm.secure.identity import Identity, shared_key
from fedjax_llm.secure.masked_deals import Sealing
from fedjax_llm.secure.masked_layout import Layout, Words, pack
from fedjax_llm.secure.masked_masks import (
    SEED_BYTES,
    Stream,
    add_streams,
    fingerprint,
    pair_stream,
    self_stream,
)
from fedjax_llm.secure.masked_messages import (
    CONSENT,
    SERVER,
    VIEW,
    Group,
    Hello,
    Request,
    Reveal,
    Survivors,
    View,
    transcript,
)
from fedjax_llm.secure.sums import BadMessage, BelowThreshold


class ClientRound:
    """One client in one round. Call the steps in order; what they return leaves the client."""

    def __init__(self, group: Group, identity: Identity, round_number: int) -> None:
        """Draws this round's secrets from the operating system."""
        self._group, self._identity, self.client = group, identity, identity.name
        self._round = round_number
        self._context = group.context(round_number)
        self._seed = secrets.token_bytes(SEED_BYTES)
        self._mask_key = X25519PrivateKey.generate()
        seal_key = X25519PrivateKey.generate()
        self._sealing = Sealing(group, self._context, self.client, seal_key)
        made = Hello(
            self.client,
            self._mask_key.public_key().public_bytes_raw(),
            seal_key.public_key().public_bytes_raw(),
            fingerprint(self._seed),
        )
        self._own_hello = made.signed(self._context, identity)
        self._hellos: dict[str, Hello] = {}
        self._hello_bytes: dict[str, bytes] = {}
        self._seed_shares: dict[str, bytes] = {}  # dealer -> the share that this client holds
        self._key_shares: dict[str, bytes] = {}
        self._streams: list[Stream] = []
        self._view: View | None = None
        self._sent: list[bytes] | None = None
        self._consented: Survivors | None = None
        # Two requests at once could otherwise both pass as the first one of the round; two deals
        # would be sealed under one key and nonce.
        self._one_at_a_time = threading.Lock()

    def hello(self) -> bytes:
        """Step 0."""
        return self._own_hello

    def deal(self, hellos: Mapping[str, bytes]) -> dict[str, bytes]:
        """Step 1: shares of both secrets for every client that greeted, sealed to it.

        Raises:
            BelowThreshold: fewer than t hellos.
            BadMessage: a hello that its client did not sign for this round.
        """
        with self._one_at_a_time:
            return self._dealt(hellos)

    def _dealt(self, hellos: Mapping[str, bytes]) -> dict[str, bytes]:
        if self._hellos:
            raise Refused(f"client {self.client!r} has dealt its shares of round {self._round}")
        self._enough("greeted", hellos)
        if hellos.get(self.client) != self._own_hello:
            raise BadMessage(SERVER, f"it does not pass on the hello of {self.client!r}")
        group, context = self._group, self._context
        found = {
            name: Hello.verified(hellos[name], name, group, context) for name in sorted(hellos)
        }
        points = {name: group.points[name] for name in found}
        seed_shares = masked_shares.split(self._seed, group.threshold, list(points.values()))
        key_shares = masked_shares.split(
            self._mask_key.private_bytes_raw(), group.threshold, list(points.values())
        )
        sealed = {}
        for name, point in points.items():
            shares = seed_shares[point], key_shares[point]
            if name == self.client:
                self._seed_shares[name], self._key_shares[name] = shares
                sealed[name] = self._sealing.keep(shares)
            else:
                sealed[name] = self._sealing.seal(found[name], shares)
        self._hellos, self._hello_bytes = found, dict(hellos)
        return sealed

    def accept(self, deals: Mapping[str, bytes]) -> bytes:
        """Keeps the shares that others dealt to this client; pairs with each of them.

        Returns:
            The signature on its view. Others must see it before they help to uncover its upload.

        Raises:
            BelowThreshold: fewer than t clients dealt, this one included.
            BadMessage: a deal that does not open, or whose shares are not as announced.
        """
        with self._one_at_a_time:
            view = self._paired(deals)
        return self._identity.sign(VIEW, *view.fields(self._group, self._context))

    def _paired(self, deals: Mapping[str, bytes]) -> View:
        if self._streams or not self._hellos:
            raise Refused(f"round {self._round} of client {self.client!r}: steps out of order")
        self._enough("dealt shares", {**deals, self.client: b""})
        streams = [self_stream(self._seed)]
        opened: dict[str, tuple[bytes, bytes]] = {}
        for name in sorted(set(deals) - {self.client}):
            if name not in self._hellos:
                raise BadMessage(name, "it dealt shares without a hello")
            dealer = self._hellos[name]
            opened[name] = self._sealing.open(dealer, deals[name])
            key = pair_key(self._mask_key, self.client, dealer.mask_public, name, self._context)
            streams.append(pair_stream(key, self.client, name))
        self._seed_shares |= {name: seed for name, (seed, _) in opened.items()}
        self._key_shares |= {name: key for name, (_, key) in opened.items()}
        self._streams = streams
        sharers = tuple(sorted(self._seed_shares))
        self._view = View(sharers, transcript(self._hello_bytes[name] for name in sharers))
        return self._view

    def upload(self, layout: Layout, ints_P: NDArray[np.integer]) -> Iterator[NDArray[np.uint8]]:
        """Step 2: the payloads of the masked upload, one per chunk, made as they are asked for.

        Args:
            layout: of the sum.
            ints_P: already checked against the layout's bound.

        Raises:
            Refused: before the first payload; see the module's table.
        """
        digests = [_digest(layout, layout.words(ints_P, chunk)) for chunk in range(layout.chunks)]
        with self._one_at_a_time:
            if not self._streams:
                raise Refused(f"round {self._round} of client {self.client!r}: steps out of order")
            if self._sent is None and self._consented is not None:
                raise Refused(
                    f"client {self.client!r} is too late: the survivors of round {self._round} are "
                    "agreed on; it takes part in the next round"
                )
            if self._sent not in (None, digests):
                raise Refused(
                    f"client {self.client!r} has sent other integers in round {self._round}: under "
                    "the same masks their difference would be seen; use a new round number"
                )
            self._sent = digests
        return self._payloads(layout, ints_P, digests)

    def _payloads(
        self, layout: Layout, ints_P: NDArray[np.integer], digests: list[bytes]
    ) -> Iterator[NDArray[np.uint8]]:
        for chunk in range(layout.chunks):
            words = layout.words(ints_P, chunk)
            if _digest(layout, words) != digests[chunk]:
                raise Refused(f"client {self.client!r}: its integers changed during their upload")
            add_streams(words, self._streams, chunk)
            yield pack(words, layout.bits)

    def consent(self, survivors: bytes, views: Mapping[str, bytes]) -> bytes:
        """Step 3: a signature on the survivor set, and on no other in this round.

        Args:
            survivors: the set, from the server.
            views: survivor -> what its ``accept`` returned.

        Raises:
            Refused, BadMessage: see the module's table.
        """
        found = Survivors.from_bytes(survivors, self._group, self._context)
        with self._one_at_a_time:
            if self._consented not in (None, found):
                raise Refused(
                    f"client {self.client!r} has agreed on the survivors of round {self._round} "
                    "and signs no other set: two sets would reveal the difference; repeat the "
                    "uploads under a new round number"
                )
            self._check(found)
            signed = found.view.fields(self._group, self._context)
            for name in found.survivors:
                self._group.roster.verify(name, VIEW, signed, views.get(name, b""))
            self._consented = found
        return self._identity.sign(CONSENT, *found.fields(self._group, self._context))

    def reveal(self, request: bytes) -> bytes:
        """Step 3: one share of every client that dealt, once t clients have signed the same set.

        Raises:
            Refused: another set than this client signed, or fewer than t signatures.
            BadMessage: a signature that is not its signer's.
        """
        asked = Request.from_bytes(request, self._group)
        found = Survivors.from_bytes(asked.survivors, self._group, self._context)
        if found != self._consented:
            raise Refused(
                f"client {self.client!r} reveals shares for the set that it signed in round "
                f"{self._round} only"
            )
        if not set(asked.consents) <= set(found.sharers):
            raise BadMessage(SERVER, "signers that never dealt shares")
        fields = found.fields(self._group, self._context)
        for name, signature in asked.consents.items():
            self._group.roster.verify(name, CONSENT, fields, signature)
        if len(asked.consents) < self._group.threshold:
            raise Refused(
                f"client {self.client!r} reveals nothing: {len(asked.consents)} clients signed the "
                f"survivors of round {self._round}, it takes {self._group.threshold}"
            )
        shares = tuple(
            (self._seed_shares if name in found.survivors else self._key_shares)[name]
            for name in found.sharers
        )
        return Reveal(shares).signed(asked.survivors, self._identity)

    def _check(self, found: Survivors) -> None:
        if found.view != self._view:
            raise BadMessage(SERVER, "others dealt shares than this client was told")
        if len(found.survivors) < self._group.minimum_clients:
            raise Refused(
                f"client {self.client!r} helps to uncover sums of {self._group.minimum_clients} or "
                f"more clients, asked for one of {len(found.survivors)}"
            )
        if self.client in found.survivors and self._sent is None:
            raise Refused(
                f"client {self.client!r} sent no upload in round {self._round} and is named as a "
                "survivor"
            )

    def _enough(self, what: str, names: Mapping[str, bytes]) -> None:
        missing = [name for name in self._group.clients if name not in names]
        present = len(self._group.clients) - len(missing)
        if present < self._group.threshold:
            raise BelowThreshold(
                f"round {self._round} needs {self._group.threshold} of {len(self._group.clients)} "
                f"clients, {present} {what}, missing {', '.join(missing)}; start it again"
            )


def pair_key(
    own_key: X25519PrivateKey, own: str, other_public: bytes, other: str, context: bytes
) -> bytes:
    """k_ij: what the masks of clients i and j are expanded from, computed by either of them."""
    pair = (name.encode() for name in sorted((own, other)))
    return shared_key(own_key, other_public, other, "masked pair", context, *pair)


def _digest(layout: Layout, words: Words) -> bytes:
    digest = hashlib.sha256(f"{layout}".encode())
    digest.update(words)
    return digest.digest()
