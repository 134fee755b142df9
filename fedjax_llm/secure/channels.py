"""MAC keys of uploads: one secret of 32 bytes between each client and the server, for one run.

Who has the right to be which client is decided by the roster that the server is given.

Identities may be kept for years; a run has keys of its own all the same. The server draws a run's
16 random bytes (``new_run``), tells them to its clients in the clear, and both put them into the
key. What this buys: an upload that somebody recorded in an earlier run under the same identities
fails its MAC in this one, though round and parameters agree, and in mode ``plain`` the epoch too.
What it does not: it keeps nobody from telling a client other bytes than the server's. The server
then refuses that client's uploads, no worse than if they had been lost on the way. A server that
starts again draws again, since it has forgotten whose uploads it had added.
"""

import secrets
from typing import Protocol

from fedjax_llm.errors import Refused
from fedjax_llm.secure.identity import Identity, PublicIdentity, Roster

_PURPOSE = "fedjax-llm channel"
_RUN_BYTES = 16


class Channels(Protocol):
    """The channel keys that a party can compute."""

    def key(self, client: str) -> bytes:
        """32 bytes that this client and the server hold, and nobody else.

        Raises:
            BadMessage: there is no such client.
        """


def new_run() -> bytes:
    """What names a run in its channel keys: 16 bytes for the server to draw, and not secret."""
    return secrets.token_bytes(_RUN_BYTES)


def channel_key(own: Identity, other: PublicIdentity, run: bytes) -> bytes:
    """The channel key between a client and the server, computed by either of them.

    Formal guarantee: that of ``Identity.agree`` (X25519, HKDF-SHA256 over both names and keys, and
    the run): uniform to everybody but the two, and independent of all other channels and runs. Two
    runs have the same key only if the server draws the same 16 bytes, with probability 2^-128 for
    each pair of runs. It has no forward secrecy: whoever learns either private key learns the
    channel's keys of all runs. They authenticate uploads and hide nothing, so that this uncovers
    no update.

    Args:
        own: the client's identity or the server's.
        other: the other one's.
        run: the 16 bytes that the server has drawn for this run.

    Raises:
        Refused: it has another length.
    """
    if len(run) != _RUN_BYTES:
        raise Refused(
            f"a run is named by {_RUN_BYTES} bytes, got {len(run)}; use those that its server drew"
        )
    return own.agree(other, _PURPOSE, run)


class ServerChannels:
    """The server's side: a key for every client of the roster, and BadMessage for a stranger."""

    def __init__(self, server: Identity, clients: Roster, run: bytes) -> None:
        """Agrees with a client when its key is first asked for.

        Args:
            server: its identity.
            clients: who may send.
            run: from ``new_run``, drawn for this run.
        """
        self._server, self._clients, self._run = server, clients, run
        self._keys: dict[str, bytes] = {}

    def key(self, client: str) -> bytes:
        """See ``Channels``."""
        if client not in self._keys:
            self._keys[client] = channel_key(self._server, self._clients[client], self._run)
        return self._keys[client]


class ClientChannel:
    """A client's side: its own key and no other."""

    def __init__(self, client: Identity, server: PublicIdentity, run: bytes) -> None:
        """Agrees with the server.

        Args:
            client: its identity.
            server: whom it sends to.
            run: what the server says that it has drawn for this run.
        """
        self._roster = Roster([client.public])
        self._key = channel_key(client, server, run)

    def key(self, client: str) -> bytes:
        """See ``Channels``."""
        self._roster[client]
        return self._key


class SimulatedChannels:
    """Both sides in one process: every name is a client, and gets an identity at first use."""

    def __init__(self) -> None:
        """A server, and no clients yet."""
        self._server = Identity.generate("server (simulated)").public
        self._run = new_run()
        self._keys: dict[str, bytes] = {}

    def key(self, client: str) -> bytes:
        """See ``Channels``. Both sides would compute the same, so one of them does."""
        if client not in self._keys:
            self._keys[client] = channel_key(Identity.generate(client), self._server, self._run)
        return self._keys[client]
