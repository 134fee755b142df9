"""What goes into one client's part of a round and what comes out of it, as pytrees of arrays.

Notation: K' clients with padding.
"""

from typing import Any, NamedTuple

import jax

from fedjax_llm.aggregation import Part
from fedjax_llm.training import ClientMetrics, ClientTable

PyTree = Any


class ClientState(NamedTuple):
    """What a client carries from round to round; it never leaves the client.

    Attributes:
        optimizer: its optimiser's state for each phase of the rule; () where it starts anew.
        kept: the sides that it keeps for itself; empty for most rules.
        control: its control variate for each phase; () without SCAFFOLD.
        noise: what correlated noise keeps; () without.
        clip: its adaptive clip norm; () without.
        replica: what it trains on from cycle to cycle; () where each begins with the global model.
        memory: what compression has left out so far; () without error feedback.
    """

    optimizer: tuple[PyTree, ...]
    kept: Part
    control: tuple[PyTree, ...]
    noise: PyTree = ()
    clip: PyTree = ()
    replica: PyTree = ()
    memory: PyTree = ()


class ClientInputs(NamedTuple):
    """What the program needs of each client; every leaf has the leading axis K'.

    Attributes:
        place: int32, the client's place in the run; addresses its randomness.
        table: its training rows.
        state: what it carried over.
        weight: float32, its weight as far as it is known beforehand.
        trains: bool, whether it trains now; the others keep their state.
        participates: bool, whether what it trains enters a sum; the others send zeros.
        online: bool, whether it can be reached; then it adds its share of integer noise.
        rank: int32, its rank.
        steps: int32, its local steps.
        batch: int32, rows of each of its steps.
        turn: int32, counts its cycles from 1 (rounds, where all wait for each other); addresses
            its randomness.
        lands: int32, the step that takes its message.
        fresh: bool, whether a replica begins anew from the global model.
        merged: bool [fragments], those that have come back since its last cycle.
    """

    place: jax.Array
    table: ClientTable
    state: ClientState
    weight: jax.Array
    trains: jax.Array
    participates: jax.Array
    online: jax.Array
    rank: jax.Array
    steps: jax.Array
    batch: jax.Array
    turn: jax.Array
    lands: jax.Array
    fresh: jax.Array
    merged: jax.Array

    def without_rows(self) -> "ClientInputs":
        """For programs that do not train, which would copy rows from the host for nothing."""
        return self._replace(table=self.table._replace(rows=(), turns=None))


class Shared(NamedTuple):
    """What is the same for all clients of a round.

    Attributes:
        base: the frozen weights, with what a rule has folded into them.
        round: the rule's view of the round, less its static phase.
        control: the global control variate of the phase; () without SCAFFOLD.
        seed: the run's key.
        clip: the adaptive clip norm of messages; () without.
        compression: the codec's public state; () without.
    """

    base: PyTree
    server: PyTree
    number: jax.Array
    control: PyTree
    seed: jax.Array
    clip: PyTree = ()
    compression: PyTree = ()


class Local(NamedTuple):
    """What local training leaves with each client; every leaf has the leading axis K'.

    Attributes:
        after: the trained part.
        control: change of its control variate; () without SCAFFOLD.
        state: what it carries on; unchanged for clients that take no part or diverged.
        metrics: measurements of the simulator; zero for clients that take no part.
    """

    after: Part
    control: PyTree
    state: ClientState
    metrics: ClientMetrics
