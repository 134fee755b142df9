"""Secure aggregation by pairwise masks: the sum for many small clients without key holders.

Every client adds to its integers one key stream per other client, which the other subtracts, and
one of its own. The server adds the uploads: streams of pairs cancel, and what is left is taken
away with seeds that the clients rebuild together, for one set of survivors per round. There are no
ciphertexts: an upload has as many bits per integer as the sum needs, and costs n - 1 AES-CTR
streams to make. In return every client must be known before a round starts and t > n / 2 of them
must be there at its end. For few clients and many parameters the mode ``threshold`` is cheaper for
the clients; for clients that cannot stay until the end it is the only one.

| part | module |
|---|---|
| a client's side | ``masked_client``, with the formal guarantee |
| the server's side | ``masked_round``, ``masked_uploads`` |
| both in one process | ``masked_parties`` |
| messages | ``masked_messages``, ``masked_deals`` |
| masks, shares, words | ``masked_masks``, ``masked_shares``, ``masked_layout`` |

Formal guarantee. With at most t - 1 clients on its side, a server that tells all clients the same
learns the sum over the survivors, who they are, and nothing more about any other client's
integers. One that lies, about who dropped out or about who is there at all, learns no more with
fewer than 2 t - n clients on its side; but it chooses the survivors, and with minimum_clients - 1
of them on its side their sum is one client's message. ``masked_client`` has the argument and the
assumptions. Clients learn nothing from each other. All keys of a round are drawn in that round and
forgotten with it: who takes a client's memory or its identity later learns no earlier update.

| case | behaviour |
|---|---|
| a client does not upload, stops in the middle, or sends damaged bytes | its masks are taken out |
| fewer than t clients alive at the end | ``BelowThreshold``; the round may be tried again |
| a total was taken | the round's secrets are forgotten, and those of all rounds before |
| more than 8 rounds under way | the one with the lowest number is given up |
| a client that is not of the group | ``Refused`` |

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical secure
aggregation for privacy-preserving machine learning", CCS 2017 (ePrint 2017/281).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels, SimulatedChannels, new_run
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.masked_layout import Layout, opening_bytes
from fedjax_llm.secure.masked_messages import Group
from fedjax_llm.secure.masked_parties import OpenRounds
from fedjax_llm.secure.masked_uploads import MaskedRound
from fedjax_llm.secure.sums import Opening, checked_ints, checked_plan
from fedjax_llm.secure.wire import Header, UploadWriter, parameters_digest, upload_bytes


class MaskedSum:
    """The ``SecureSum`` of clients that mask their integers pairwise.

    All parties run in one process and pass each other the bytes that would cross a network:
    ``ClientRound`` and ``RoundServer`` are the two sides.
    """

    kind = "masked"

    def __init__(
        self,
        clients: Sequence[str],
        count: int,
        max_abs: int,
        summands: int,
        threshold: int | None = None,
        minimum_clients: int = 2,
        channels: Channels | None = None,
    ) -> None:
        """Makes the clients' identities; secrets of a round are drawn when it is first used.

        Args:
            clients: all that may take part in a round, at least 2.
            count: integers per client.
            max_abs: bound of every integer's absolute value (``FixedPoint.max_int``).
            summands: most clients of one sum.
            threshold: t, how many clients must be there at the end of a round, in (n / 2, n];
                None is the least, floor(n / 2) + 1.
            minimum_clients: fewest clients whose sum the clients help to uncover. A sum of one is
                that client's message, so less than 2 makes sense only where that is acceptable.
            channels: MAC keys between clients and server; None makes some.

        Raises:
            Refused: a threshold or minimum that gives the guarantee away, or bad names.
            UserError: a size is below 1, or the sum could overflow 63 bits.
        """
        checked_plan(count, max_abs, summands, minimum_clients)
        self.layout = Layout(count, max_abs, summands)
        identities = [Identity.generate(name) for name in clients]
        roster = Roster([identity.public for identity in identities])
        least = len(clients) // 2 + 1
        self.group = Group(
            roster,
            least if threshold is None else threshold,
            minimum_clients,
            run=new_run(),
        )
        self._channels = channels or SimulatedChannels()
        self._parameters = parameters_digest("masked", count, max_abs, summands, self.layout.bits)
        self.rounds = OpenRounds(self.group, identities)

    @property
    def count(self) -> int:
        """Integers per client."""
        return self.layout.count

    @property
    def max_abs(self) -> int:
        """Bound of every integer's absolute value."""
        return self.layout.max_abs

    @property
    def summands(self) -> int:
        """Most clients of one sum."""
        return self.layout.summands

    @property
    def minimum_clients(self) -> int:
        """Fewest clients of one sum."""
        return self.group.minimum_clients

    def statement(self) -> str:
        """Who can decrypt what."""
        group = self.group
        n, t = len(group.clients), group.threshold
        return (
            f"pairwise masks among {n} clients, {t} of which must be there at the end of a round: "
            f"the server sees one sum per round, of {group.minimum_clients} or more clients; to "
            f"uncover another client's update it needs {min(t, n - 1)} clients on its side, or "
            f"{group.helpers} if it lies about who dropped out, and with fewer it cannot; "
            "simulated: one process plays all parties"
        )

    def check_alive(self, alive: Sequence[str]) -> None:
        """Refuses a round that could not be ended with these clients alone."""
        self.rounds.living(alive)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The masked chunks of a client; see ``SecureSum.upload`` and ``masked_client``.

        The first use of a round number runs steps 0 and 1 among all clients. The same integers
        may be uploaded again, others not.
        """
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        self.rounds.check(round_number)
        header = self.header(client, round_number)
        payloads = self.rounds.parties(round_number).clients[client].upload(self.layout, ints)
        writer = UploadWriter(header, self._channels.key(client), self.layout.chunks)
        return (writer.write(payload) for payload in payloads)

    def upload_bytes(self, client: str) -> int:
        """Exact length of all chunks of one upload of this client."""
        return upload_bytes(client, self.layout.payload_bytes)

    @property
    def opening(self) -> Opening:
        """The clients show shares of each other's seeds."""
        return Opening(self.group.threshold, *opening_bytes(len(self.group.clients)))

    def begin(self, round_number: int) -> "MaskedRound":
        """The server's side of a round; see ``SecureSum.begin``."""
        self.rounds.check(round_number)
        return MaskedRound(
            self.layout,
            self.minimum_clients,
            self.rounds,
            round_number,
            lambda client: self.header(client, round_number),
            self._channels,
        )

    def header(self, client: str, round_number: int) -> Header:
        """What a client's chunks say of themselves.

        Raises:
            Refused: the client is not of the group.
        """
        if client not in self.group.points:
            raise Refused(
                f"client {client!r} is not of this masked sum's group; name it in `clients` when "
                "the sum is set up"
            )
        return Header(
            self.kind, self._parameters, self.group.epoch, round_number, self.count, client
        )
