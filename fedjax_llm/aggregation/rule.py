"""An aggregation rule is three pure functions: what is kept, what is sent, how the sum is applied.

Everything a client sends is *added* to what the others send. A rule that has to read the clients'
results one by one says so in its type (`needs_individual_messages`), and a run that asks for it
together with a secure sum is refused when the run file is read.

    init(adapter) -> ServerState
    message(round, result) -> tree            at a client, after `start` and local training
    apply(round, mean of the trees) -> ServerState

A rule is a subclass of `AggregationRule` that states its facts and overrides what differs from
averaging the changes of the sides it trains. `README.md` beside this file shows how to add one.

Notation: as in `lora.algebra`; L layers, K clients.
"""

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.aggregation.part import (
    Part,
    Side,
    pick,
    put,
    size_at_rank,
    subset,
    where_rank,
    zip_with,
)
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Adapter
from fedjax_llm.training import optimizer_init, optimizer_step

PyTree = Any


class ServerState(NamedTuple):
    """What the server carries from round to round.

    Attributes:
        adapter: the global adapter.
        optimizer: the server optimiser's state for each phase of the rule.
        residual: float32 [L, D, F] by projection, added to the frozen base weights; empty for all
            rules but those that fold their results into the base.
        memory: what else a rule keeps; () for most.
    """

    adapter: Adapter
    optimizer: tuple[PyTree, ...]
    residual: dict[str, jax.Array]
    memory: PyTree = ()


class Round(NamedTuple):
    """What server and clients know alike in a round.

    Attributes:
        server: the state that was broadcast.
        phase: index into the rule's `phases`; static.
        number: int32 scalar, the round, from 1.
        key: public randomness of this round, the same for all.
    """

    server: ServerState
    phase: int
    number: jax.Array
    key: jax.Array


class LocalResult(NamedTuple):
    """What a client has at hand when it writes its message.

    Attributes:
        before: where its training started.
        after: where it ended; coordinates that it may not train are as in `before`.
        rank: int32 scalar, the client's rank.
    """

    before: Part
    after: Part
    rank: jax.Array


@dataclass(frozen=True)
class Facts:
    """What a rule promises; `fedjax-llm rules` prints it and the contract suite tests it.

    Attributes:
        exact: the global product after a round is the weighted mean of the clients' products B@A
            (with the plain server step, before clipping, rounding and noise).
        dp_safe: noise on a round's messages enters the product linearly, not as noise times noise.
        ranks: clients may have different ranks.
        uplink: what a client sends a round, in words of D, F and R, per layer and projection.
        downlink: what it receives.
    """

    exact: bool
    dp_safe: bool
    ranks: bool
    uplink: str
    downlink: str


@dataclass(frozen=True)
class AggregationRule(ABC):
    """How local results become the next global adapter.

    Attributes:
        optimizer: the server's optax transformation; it receives the negated mean message as
            its gradient (arXiv 2003.00295, algorithm 2), so `optax.sgd(1.0)` is FedAvg.

    Class attributes:
        name: the name in the run file.
        source: the paper.
        summary: one line.
        facts: what it promises.
        phases: the sides trained in a round; rounds take them in turn.
        kept: sides that stay with their client and are never sent.
        stages: sums of a round. Each stage's message may depend on the sum before.
        needs_individual_messages: the rule must see each message, which no secure sum allows.
        plain_steps_only: the server's step is not one in the coordinates of what is sent: the
            server optimiser must be sgd, whose rate the rule takes.
        new_coordinates: the rule rewrites the adapter each round, so that moments of earlier rounds
            mean nothing: the clients' optimisers start anew.
        truncates: a client of a smaller rank runs with the leading part of the adapter alone, not
            with all of it.
        weighs_by_result: the weight of a client follows from its result, see `weight`.
    """

    optimizer: optax.GradientTransformation

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]
    facts: ClassVar[Facts]
    phases: ClassVar[tuple[tuple[Side, ...], ...]]
    kept: ClassVar[tuple[Side, ...]] = ()
    stages: ClassVar[int] = 1
    needs_individual_messages: ClassVar[bool] = False
    plain_steps_only: ClassVar[bool] = False
    new_coordinates: ClassVar[bool] = False
    truncates: ClassVar[bool] = False
    weighs_by_result: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses a server optimiser that the rule cannot carry from round to round.

        Raises:
            UserError: see `plain_steps_only`.
        """
        if not self.plain_steps_only:
            return
        state = self.optimizer.init(jnp.zeros(2))
        if any(jnp.shape(leaf) == (2,) for leaf in jax.tree.leaves(state)):
            raise UserError(
                f"rule {self.name!r} takes plain steps only, because moments of a server optimiser "
                "would belong to another round's coordinates; use server_optimizer sgd, or another "
                "rule"
            )

    # At the server, before the first round.

    def init(self, adapter: Adapter) -> ServerState:
        """Returns the server's state before the first round."""
        return self._with_optimizer(ServerState(self.prepared(adapter), (), {}))

    def restarted(self, server: ServerState) -> ServerState:
        """The state with the server optimiser as new."""
        return self._with_optimizer(server)

    def prepared(self, adapter: Adapter) -> Adapter:
        """The adapter as the rule wants it to start; the same product."""
        return adapter

    def phase(self, round_number: int) -> int:
        """The phase of a round, counted from 1."""
        return (round_number - 1) % len(self.phases)

    # At a client.

    def trainable(self, server: ServerState, phase: int = 0) -> Part:
        """The global values of the sides that are trained."""
        return pick(server.adapter, self.phases[phase])

    def start(self, round_: Round, rank: jax.Array) -> Part:
        """Where a client of this rank starts to train; it puts its kept sides in place."""
        whole = self.trainable(round_.server, round_.phase)
        return where_rank(whole, zip_with(jnp.zeros_like, whole), rank) if self.truncates else whole

    def limited(self, before: Part, after: Part, rank: jax.Array) -> Part:
        """`after` where a client of this rank may train, `before` beyond.

        Unless the rule truncates, a smaller rank limits what is trained and sent, not the adapter
        that the model runs with: so a rule that is exact stays exact.
        """
        return where_rank(after, before, rank) if self.facts.ranks else after

    def adapter(self, server: ServerState, part: Part) -> Adapter:
        """The adapter that the model runs with for values of the trained sides; pure."""
        return put(server.adapter, part)

    def message(self, round_: Round, result: LocalResult, stage: int, shared: PyTree) -> PyTree:
        """What a client adds to the sum of a stage: the change of the sides that are sent.

        Args:
            round_: what everybody knows.
            result: of this client.
            stage: from 0; static.
            shared: what the server made of the stage before; () in the first.
        """
        del stage, shared
        sent = self.sent(round_.phase)
        change = zip_with(jnp.subtract, result.after, result.before)
        return subset(change, sent)

    def weight(self, round_: Round, result: LocalResult) -> jax.Array:
        """The weight that a client's result gives it, float32, not negative; 1 for most rules."""
        del round_, result
        return jnp.float32(1)

    # At the server.

    def between(self, round_: Round, stage: int, mean: PyTree) -> PyTree:
        """What all clients need of the sum of a stage to write the message of the next one."""
        raise AssertionError(f"rule {self.name!r} has one stage")

    def apply(self, round_: Round, mean: PyTree, shared: PyTree = ()) -> ServerState:
        """Applies the mean of the clients' messages of the last stage.

        Args:
            round_: what everybody knows.
            mean: the sum of the messages divided by the sum of their weights.
            shared: what `between` returned last; ().
        """
        del shared
        after, server = self._step(round_, mean)
        return server._replace(adapter=self.adapter(server, after))

    def apply_each(
        self, round_: Round, messages_K: PyTree, shares_K: jax.Array, ranks_K: jax.Array
    ) -> ServerState:
        """Applies messages one by one; for rules that need to.

        Args:
            round_: what everybody knows.
            messages_K: the clients' messages, leaves [K, ...]; zeros where the share is 0.
            shares_K: float32 [K], weights that add up to one.
            ranks_K: int32 [K].
        """
        raise AssertionError(f"rule {self.name!r} adds its messages")

    # What crosses a link.

    def messages(self, server: ServerState, phase: int) -> tuple[list[PyTree], list[PyTree]]:
        """Shapes of each stage's message, and of what goes back between one stage and the next.

        Args:
            server: shapes are enough.
            phase: of the round.
        """

        def all_stages(server: ServerState, key: jax.Array) -> tuple[list[PyTree], list[PyTree]]:
            round_ = Round(server, phase, jnp.int32(1), key)
            part = self.trainable(server, phase)
            result = LocalResult(part, part, jnp.int32(1))
            messages, answers, shared = [], [], ()
            for stage in range(self.stages):
                messages.append(self.message(round_, result, stage, shared))
                if stage + 1 < self.stages:
                    shared = self.between(round_, stage, messages[-1])
                    answers.append(shared)
            return messages, answers

        return jax.eval_shape(all_stages, server, jax.random.key(0))

    def sent(self, phase: int) -> tuple[Side, ...]:
        """The sides that a client sends."""
        return tuple(side for side in self.phases[phase] if side not in self.kept)

    def uplink(self, server: ServerState, phase: int, rank: int) -> int:
        """Numbers that a client of this rank sends in a round; shapes are enough."""
        return size_at_rank(subset(self.trainable(server, phase), self.sent(phase)), rank)

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """Numbers that a client receives after a round, or before the next one.

        Args:
            server: shapes are enough.
            phase: of the round.
            ranks: of the clients that took part.
            rank: of this client.
        """
        del ranks
        sent = subset(self.trainable(server, phase), self.sent(phase))
        return size_at_rank(sent, rank if self.truncates else None)

    # For rules.

    @property
    def personal(self) -> bool:
        """Whether each client ends with an adapter of its own."""
        return bool(self.kept)

    def _with_optimizer(self, server: ServerState) -> ServerState:
        """The state with a fresh server optimiser for each phase."""
        targets = [
            # The rate of a plain step is all that such a rule takes, see `_rate`.
            jnp.zeros(1)
            if self.plain_steps_only
            else subset(self.trainable(server, phase), self.sent(phase))
            for phase in range(len(self.phases))
        ]
        states = tuple(optimizer_init(self.optimizer, target) for target in targets)
        return server._replace(optimizer=states)

    def _step(self, round_: Round, mean: Part) -> tuple[Part, ServerState]:
        """The sides that were sent after the server optimiser's step, and its state."""
        server, phase = round_.server, round_.phase
        current = subset(self.trainable(server, phase), self.sent(phase))
        gradient = zip_with(jnp.negative, mean)
        after, state = optimizer_step(self.optimizer, gradient, server.optimizer[phase], current)
        return after, self._with_state(round_, state)

    def _rate(self, round_: Round) -> tuple[jax.Array, ServerState]:
        """The rate of this round's plain step, and the state with the optimiser's step counted."""
        state = round_.server.optimizer[round_.phase]
        rate_1, state = optimizer_step(self.optimizer, -jnp.ones(1), state, jnp.zeros(1))
        return rate_1[0], self._with_state(round_, state)

    def _with_state(self, round_: Round, state: PyTree) -> ServerState:
        states, phase = round_.server.optimizer, round_.phase
        return round_.server._replace(optimizer=(*states[:phase], state, *states[phase + 1 :]))
