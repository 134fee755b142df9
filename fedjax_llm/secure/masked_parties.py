"""All parties of masked rounds in one process, passing each other the bytes of a network.

A round's secrets exist from its first use until a total of it, or of a later round, was taken.
"""

from collections.abc import Callable, Sequence

from fedjax_llm.errors import Refused
from fedjax_llm.secure.identity import Identity
from fedjax_llm.secure.masked_client import ClientRound
from fedjax_llm.secure.masked_masks import Stream
from fedjax_llm.secure.masked_messages import Group
from fedjax_llm.secure.masked_round import RoundServer
from fedjax_llm.secure.sums import BelowThreshold, NoAnswer, RoundNumbers

_MOST_OPEN = 8


class Parties:
    """One round's clients and its server, after steps 0 and 1."""

    def __init__(self, group: Group, identities: Sequence[Identity], round_number: int) -> None:
        """Relays hellos and deals between all of them."""
        self.server = RoundServer(group, round_number)
        made = [ClientRound(group, identity, round_number) for identity in identities]
        self.clients = {party.client: party for party in made}
        for name, party in self.clients.items():
            self.server.hello(name, party.hello())
        for name, party in self.clients.items():
            self.server.deal(name, party.deal(self.server.hellos(name)))
        for name, party in self.clients.items():
            self.server.accepted(name, party.accept(self.server.deals(name)))

    def recover(self, survivors: Sequence[str], alive: Sequence[str]) -> list[Stream]:
        """Step 3 with those that are alive; a client that gives no answer is left out."""
        statement = self.server.close(survivors)
        views = self.server.views
        signed = self._answers(alive, lambda client: client.consent(statement, views))
        for name, signature in signed.items():
            self.server.consent(name, signature)
        request = self.server.request()
        revealed = self._answers(list(signed), lambda client: client.reveal(request))
        for name, data in revealed.items():
            self.server.reveal(name, data)
        return self.server.recover()

    def _answers(
        self, names: Sequence[str], ask: Callable[[ClientRound], bytes]
    ) -> dict[str, bytes]:
        answers = {}
        for name in names:
            try:
                answers[name] = ask(self.clients[name])
            except NoAnswer:
                continue
        return answers


class OpenRounds:
    """The rounds under way, and which of them may still end in a total.

    | round number | result |
    |---|---|
    | new | greetings and deals among all clients |
    | under way | the parties that it has |
    | at most that of the last total | Refused |
    | new, with 8 others under way | the lowest of the 9 is given up: the parties would pile up |
    | given up, or below one that was | Refused: no round number gets a second set of keys |
    """

    def __init__(self, group: Group, identities: Sequence[Identity]) -> None:
        """No round is under way."""
        self._group, self._identities = group, tuple(identities)
        self._numbers = RoundNumbers()
        self._given_up = -1
        self._open: dict[int, Parties] = {}

    def check(self, round_number: int) -> None:
        """Raises Refused unless a total of this round may still be taken."""
        self._numbers.check(round_number)
        lowest = min(self._open, default=round_number)
        crowded = len(self._open) == _MOST_OPEN and round_number < lowest
        if round_number <= self._given_up or crowded:
            raise Refused(
                f"round {round_number} was given up: {_MOST_OPEN} later ones are under way; use a "
                "larger round number"
            )

    def parties(self, round_number: int) -> Parties:
        """The parties of a round; see the table."""
        self.check(round_number)
        if round_number not in self._open:
            # Made before another one is given up for it, since making it may fail.
            made = Parties(self._group, self._identities, round_number)
            if len(self._open) == _MOST_OPEN:
                self._given_up = min(self._open)
                del self._open[self._given_up]
            self._open[round_number] = made
        return self._open[round_number]

    def living(self, alive: Sequence[str]) -> list[str]:
        """The clients of the group that are alive: they can still reveal shares.

        Raises:
            BelowThreshold: fewer than t of them, naming who is missing.
        """
        clients, t = self._group.clients, self._group.threshold
        living = [name for name in clients if name in alive]
        if len(living) < t:
            missing = ", ".join(name for name in clients if name not in living)
            raise BelowThreshold(
                f"a masked round needs {t} of {len(clients)} clients at its end, {len(living)} "
                f"alive, missing {missing}; start one of them again"
            )
        return living

    def recover(
        self, round_number: int, survivors: Sequence[str], alive: Sequence[str]
    ) -> list[Stream]:
        """The masks that are left in the survivors' sum; the round is over afterwards."""
        streams = self.parties(round_number).recover(survivors, self.living(alive))
        self._numbers.take(round_number)
        for number in [number for number in self._open if number <= round_number]:
            del self._open[number]
        return streams
