"""The server of a masked round: relays, closes the survivor set, takes masks away.

It holds no secret until t clients reveal shares for one survivor set. From those it rebuilds b_i of
the clients whose uploads are in the sum, and the mask keys of those whose are not, and checks each
against what its owner announced in step 0: the sum is exact, or there is none.

| event | behaviour |
|---|---|
| no hello or no deal of a client | it is not in the round; nobody pairs with it |
| a hello after the hellos, or a deal after the deals, went out | ``Refused``, naming who is late |
| fewer than t hellos or deals when they are asked for | ``BelowThreshold``; more may come |
| a signature on other deals than were sent | ``BadMessage``, naming the signer |
| a survivor without a signature on its deals | ``BadMessage``, naming it |
| no complete upload | its mask key is rebuilt, and its pair masks are taken from the others' |
| no consent, or no reveal | t others are enough |
| fewer than t consents or reveals | ``BelowThreshold``, naming who is missing; may be asked again |
| a share that is not the one dealt | ``BadMessage``, naming who sent it |
| shares as dealt that give another secret than announced | ``BadMessage``, naming the dealer |
| another survivor set in the same round | ``Refused`` |
| a client whose upload was made under other masks | ``WrongSum``, from the canary |

In the last line, garbage passes the canary with probability 2^-m per chunk, m being the bits of a
word, and then still has to pass the range check. The client is not named, for only the sum is seen.
"""

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedjax_llm.errors import Refused
from fedjax_llm.secure import masked_shares
from fedjax_llm.secure.masked_client import pair_key
from fedjax_llm.secure.masked_deals import Deal, share_digest
from fedjax_llm.secure.masked_masks import Stream, fingerprint, pair_stream, self_stream
from fedjax_llm.secure.masked_messages import (
    CONSENT,
    VIEW,
    Group,
    Hello,
    Request,
    Reveal,
    Survivors,
    View,
    transcript,
)
from fedjax_llm.secure.shamir import lagrange_at_zero
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, checked_clients


class RoundServer:
    """One round as the server sees it. What its methods take has come from clients."""

    def __init__(self, group: Group, round_number: int) -> None:
        """A round nobody has greeted in."""
        self._group, self._round = group, round_number
        self._context = group.context(round_number)
        self._hello_bytes: dict[str, bytes] = {}
        self._hellos: dict[str, Hello] = {}
        self._deals: dict[str, dict[str, bytes]] = {}
        self._greeting_is_over = False
        self._view: View | None = None  # of all clients, once dealing is over
        self._views: dict[str, bytes] = {}
        self._survivors: Survivors | None = None
        self._consents: dict[str, bytes] = {}
        self._reveals: dict[str, Reveal] = {}
        self.bytes_up = dict.fromkeys(group.clients, 0)
        self.bytes_down = dict.fromkeys(group.clients, 0)

    @property
    def sharers(self) -> tuple[str, ...]:
        """Who has dealt shares, sorted."""
        return tuple(sorted(self._deals))

    def hello(self, client: str, data: bytes) -> None:
        """Step 0: takes a client's round keys; the same bytes may come again.

        Raises:
            BadMessage: naming the client; not its hello of this round, or not the first one.
            Refused: it is too late.
        """
        self._known(client)
        found = Hello.verified(data, client, self._group, self._context)
        if self._greeting_is_over and client not in self._hello_bytes:
            raise self._late(client, "the others have been told who greeted")
        if self._hello_bytes.setdefault(client, data) != data:
            raise BadMessage(client, "a second hello in this round, with other keys")
        self._hellos[client] = found
        self.bytes_up[client] += len(data)

    def hellos(self, client: str) -> dict[str, bytes]:
        """What this client is sent before step 1. From now on nobody else may greet.

        Raises:
            BadMessage: the client has not greeted.
            BelowThreshold: fewer than t clients have. More may come.
        """
        self._greeted(client)
        self._enough("greeted", self._hellos)
        self._greeting_is_over = True
        self.bytes_down[client] += sum(map(len, self._hello_bytes.values()))
        return dict(self._hello_bytes)

    def deal(self, client: str, deals: Mapping[str, bytes]) -> None:
        """Step 1: takes the sealed shares that a client deals to everybody who greeted.

        Raises:
            BadMessage: naming the client; not one deal to everybody.
            Refused: it is too late.
        """
        self._greeted(client)
        if self._view is not None and client not in self._deals:
            raise self._late(client, "the others have been told who dealt shares")
        if client in self._deals or set(deals) != set(self._hellos):
            raise BadMessage(client, "it must deal once, to exactly the clients that greeted")
        for data in deals.values():
            Deal.from_bytes(data, client)
        self._deals[client] = dict(deals)
        self.bytes_up[client] += sum(map(len, deals.values()))

    def deals(self, client: str) -> dict[str, bytes]:
        """What this client is sent before step 2: dealer -> its deal to this client.

        From now on nobody else may deal.

        Raises:
            BadMessage: the client has not dealt itself.
            BelowThreshold: fewer than t clients have. More may come.
        """
        self._dealt(client)
        self._enough("dealt shares", self._deals)
        if self._view is None:
            sharers = self.sharers
            self._view = View(sharers, transcript(self._hello_bytes[name] for name in sharers))
        sent = {dealer: deals[client] for dealer, deals in self._deals.items() if dealer != client}
        self.bytes_down[client] += sum(map(len, sent.values()))
        return sent

    def accepted(self, client: str, signature: bytes) -> None:
        """End of step 1: takes a client's signature on whom it pairs with, from its ``accept``.

        Raises:
            BadMessage: naming the client; it signed other deals than it was sent.
        """
        self._dealt(client)
        if self._view is None:
            raise BadMessage(client, "it signs for deals that nobody has been sent")
        fields = self._view.fields(self._group, self._context)
        self._group.roster.verify(client, VIEW, fields, signature)
        self._views[client] = signature
        self.bytes_up[client] += len(signature)

    @property
    def views(self) -> dict[str, bytes]:
        """What everybody is shown next to the survivors: what each of them signed."""
        return {name: self._views[name] for name in self._closed.survivors}

    def close(self, survivors: Sequence[str]) -> bytes:
        """Step 3: fixes whose uploads are summed. The same set may be closed again, no other.

        Raises:
            Refused: fewer than ``minimum_clients``, or another set than before.
            BadMessage: a survivor that has not signed for its deals. Nobody would uncover a set
                that holds it.
        """
        kept = tuple(sorted(set(survivors)))
        checked_clients(kept, self._group.minimum_clients, len(self._group.clients))
        strangers = [name for name in kept if name not in self._deals]
        if strangers or self._view is None:
            raise Refused(
                f"{', '.join(strangers) or f'round {self._round}'}: no shares were dealt, so that "
                "the masks could not be taken away"
            )
        for name in kept:
            if name not in self._views:
                raise BadMessage(name, "it has not signed for the shares that it was dealt")
        made = Survivors(self._view.sharers, kept, self._view.transcript)
        if self._survivors not in (None, made):
            raise Refused(
                f"round {self._round} has been closed with the clients "
                f"{', '.join(self._survivors.survivors if self._survivors else ())}: a second set "
                "would reveal the difference; repeat the uploads under a new round number"
            )
        self._survivors = made
        return made.to_bytes(self._group, self._context)

    def consent(self, client: str, signature: bytes) -> None:
        """Step 3: takes a client's signature on the survivor set."""
        self._dealt(client)
        fields = self._closed.fields(self._group, self._context)
        self._group.roster.verify(client, CONSENT, fields, signature)
        self._consents[client] = signature
        self.bytes_up[client] += len(signature)
        self.bytes_down[client] += len(self._survivor_bytes) + sum(map(len, self.views.values()))

    def request(self) -> bytes:
        """Step 3: the survivor set with t signatures, for everybody who may reveal.

        Raises:
            BelowThreshold: fewer than t clients have signed.
        """
        self._enough("agreed on the survivors", self._consents)
        chosen = sorted(self._consents)[: self._group.threshold]
        consents = {name: self._consents[name] for name in chosen}
        return Request(self._survivor_bytes, consents).to_bytes(self._group)

    def reveal(self, client: str, data: bytes) -> None:
        """Step 3: takes a client's shares, checked one by one against the dealers' digests.

        Raises:
            BadMessage: naming the client; its message is as if it had not come.
        """
        self._dealt(client)
        closed = self._closed
        found = Reveal.verified(
            data, client, self._group, self._survivor_bytes, len(closed.sharers)
        )
        for dealer, share in zip(closed.sharers, found.shares, strict=True):
            deal = Deal.from_bytes(self._deals[dealer][client], dealer)
            kind = "seed" if dealer in closed.survivors else "key"
            expected = deal.seed_digest if kind == "seed" else deal.key_digest
            if share_digest(self._context, dealer, client, kind, share) != expected:
                raise BadMessage(
                    client, f"it revealed another share of {dealer!r} than was dealt to it"
                )
        self._reveals[client] = found
        self.bytes_up[client] += len(data)
        self.bytes_down[client] += len(self.request())

    def recover(self) -> list[Stream]:
        """The masks to add to the sum of the survivors' uploads so that none is left.

        Raises:
            BelowThreshold: fewer than t clients have revealed.
            BadMessage: naming a client that dealt shares of another secret than it announced.
        """
        self._enough("revealed their shares", self._reveals)
        closed, points = self._closed, self._group.points
        chosen = sorted(self._reveals)[: self._group.threshold]
        weights = lagrange_at_zero([points[name] for name in chosen], masked_shares.PRIME)
        streams = []
        for place, owner in enumerate(closed.sharers):
            shares = {points[name]: self._reveals[name].shares[place] for name in chosen}
            secret = masked_shares.rebuild(shares, weights)
            if owner in closed.survivors:
                streams.append(self_stream(self._checked_seed(owner, secret)).inverse)
                continue
            key = self._checked_key(owner, secret)
            for name in closed.survivors:
                shared = pair_key(key, owner, self._hellos[name].mask_public, name, self._context)
                streams.append(pair_stream(shared, name, owner).inverse)
        return streams

    def _checked_seed(self, owner: str, seed: bytes | None) -> bytes:
        if seed is None or fingerprint(seed) != self._hellos[owner].fingerprint:
            raise BadMessage(owner, "it dealt shares of another self seed than it announced")
        return seed

    def _checked_key(self, owner: str, secret: bytes | None) -> X25519PrivateKey:
        if secret is not None:
            key = X25519PrivateKey.from_private_bytes(secret)
            if key.public_key().public_bytes_raw() == self._hellos[owner].mask_public:
                return key
        raise BadMessage(owner, "it dealt shares of another mask key than it announced")

    @property
    def _closed(self) -> Survivors:
        if self._survivors is None:
            raise Refused(f"round {self._round} has no survivor set yet")
        return self._survivors

    @property
    def _survivor_bytes(self) -> bytes:
        return self._closed.to_bytes(self._group, self._context)

    def _known(self, client: str) -> None:
        if client not in self._group.points:
            raise BadMessage(client, "a stranger: it is no client of this masked sum")

    def _greeted(self, client: str) -> None:
        self._known(client)
        if client not in self._hellos:
            raise BadMessage(client, "it did not greet in this round")

    def _late(self, client: str, since: str) -> Refused:
        return Refused(
            f"client {client!r} is too late for round {self._round}: {since}; it takes part in the "
            "next round"
        )

    def _dealt(self, client: str) -> None:
        if client not in self._deals:
            raise BadMessage(client, "it dealt no shares in this round")

    def _enough(self, what: str, names: Mapping[str, object]) -> None:
        missing = [name for name in self._group.clients if name not in names]
        if len(names) < self._group.threshold:
            raise BelowThreshold(
                f"round {self._round} needs {self._group.threshold} of "
                f"{len(self._group.clients)} clients, {len(names)} {what}, missing "
                f"{', '.join(missing)}; start one of them again or repeat the round"
            )
