"""A codec at its place in a round: after the weight, before the clip, the rounding and the sum.

    message -> + memory -> encode -> clip -> fixed point -> sum -> mean -> decode -> server step

Every client of a sum encodes with the same public state and key, those of the step that takes the
message. The clip bounds what is sent, so that a privacy unit `client` is protected by noise on the
encoded sum, and decoding is post-processing. With units `example` and `user` the message is private
before it comes here.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_llm.aggregation import Part, ServerState
from fedjax_llm.compression import Chain, Codec, Fragment, Identity, feedback
from fedjax_llm.errors import UserError
from fedjax_llm.federation.keys import Purpose, Seeds, key_for
from fedjax_llm.federation.replicas import fragment_of_layer

PyTree = Any
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class Compression:
    """How messages are shortened.

    Attributes:
        codec: a linear map that all clients of a round share.
        error_feedback: whether what does not arrive is added to the client's next message.
        rounding: to the nearest integer, or at random to one of the two neighbours, which is right
            on average and lets few bits do.
        broadcast: what the server sends back: the "adapter", 4 bytes a number, or the opened "sum"
            in its own bits, from which each client computes the server's step itself.
        tail: how often, at most, a message that is rounded to the nearest is cut because one number
            of it does not fit.
    """

    codec: Codec = field(default_factory=Identity)
    error_feedback: bool = False
    rounding: Rounding = "nearest"
    broadcast: Literal["adapter", "sum"] = "adapter"
    tail: float = 1e-3

    def __post_init__(self) -> None:
        """Raises Refused for a memory that would grow without bound."""
        if self.error_feedback:
            feedback.check(self.codec)

    def in_turns(self, fragments: int) -> "Compression":
        """The same where the layers travel in so many parts, one after the other."""
        if fragments == 1:
            return self
        inner = () if isinstance(self.codec, Identity) else (self.codec,)
        return replace(self, codec=Chain((Fragment(fragments), *inner)))


@dataclass(frozen=True, eq=False)
class Compressor:
    """A compression for the messages of one federation.

    Attributes:
        compression: the settings.
        like: shapes of an upload.
        kept: what a client's replica keeps of itself where a fragment comes back; None without
            replicas.
    """

    compression: Compression
    like: PyTree
    kept: float | None = None

    @property
    def fragments(self) -> int:
        """Parts in which the layers travel, one after the other; 1 if all travel together."""
        codec = self.compression.codec
        first = codec.codecs[0] if isinstance(codec, Chain) else codec
        return first.fragments if isinstance(first, Fragment) else 1

    @property
    def stages(self) -> int:
        """Sums of a round."""
        return self.compression.codec.stages

    @cached_property
    def shapes(self) -> tuple[PyTree, ...]:
        """Of what is sent in each stage."""
        codec = self.compression.codec
        return tuple(codec.shapes(self.like, stage) for stage in range(codec.stages))

    def bound(self, norm: float, stage: int, bits: int, clients: int) -> float:
        """How far fixed point reaches for encodings that are clipped to `norm`.

        Rounding at random takes the bound of the least error, for few bits; rounding to the nearest
        one that next to no number passes.

        Args:
            norm: l2 norm of what is sent.
            stage: static.
            bits: of a number.
            clients: whose messages add up.
        """
        codec, compression = self.compression.codec, self.compression
        if compression.rounding == "stochastic":
            return codec.least_error_bound(self.like, norm, bits, clients, stage)
        return codec.coordinate_bound(self.like, norm, compression.tail, stage)

    def init(self) -> PyTree:
        """The public state before the first round."""
        return self.compression.codec.init(self.like)

    def memory(self) -> PyTree:
        """A client's memory before its first message; () without error feedback."""
        return feedback.empty(self.like) if self.compression.error_feedback else ()

    def check_ahead(self, name: str) -> None:
        """Refuses a state that a message written ahead of its step cannot know.

        Raises:
            UserError: naming the schedule.
        """
        codec = self.compression.codec
        each = codec.codecs if isinstance(codec, Chain) else (codec,)
        # Whose turn it is follows from the step's number.
        keeping = [one for one in each if one.facts.keeps and not isinstance(one, Fragment)]
        if keeping or codec.stages > 1:
            what = keeping[0].name if keeping else codec.name
            raise UserError(
                f"{what} needs what the last step came to, and with schedule {name!r} messages are "
                "written before that; use a codec without a state, or schedule synchronous"
            )

    def encode(
        self,
        state: PyTree,
        seed: jax.Array | Seeds,
        lands: jax.Array,
        memory: PyTree,
        message: PyTree,
        stage: int,
        shared: PyTree,
    ) -> PyTree:
        """What is sent of a message in a stage, before it is clipped.

        Args:
            state: public.
            seed: the run's key.
            lands: int32, the step that takes the message.
            memory: the client's.
            message: weighted.
            stage: static.
            shared: what `between` gave.
        """
        return self.compression.codec.encode(
            self._state(state, lands), self._key(seed, lands), self._corrected(memory, message),
            stage, shared,
        )  # fmt: skip

    def remember(
        self,
        state: PyTree,
        seed: jax.Array | Seeds,
        lands: jax.Array,
        memory: PyTree,
        message: PyTree,
        shared: PyTree,
        sent: PyTree,
        took_part: jax.Array,
    ) -> PyTree:
        """The client's memory after its message.

        A replica is a memory too: it keeps the layers whose turn it is not, and a part `kept` of
        those that come back. So only the rest goes into the memory, lest it be said twice.

        Args:
            state: public.
            seed: the run's key.
            lands: int32, the step that takes the message.
            memory: before.
            message: weighted.
            shared: what `between` gave.
            sent: the encoding as it left the client, in the length that it had before the clip.
            took_part: whether it enters a sum.
        """
        if not self.compression.error_feedback:
            return ()
        after = feedback.remember(
            self.compression.codec, self._state(state, lands), self._key(seed, lands), memory,
            self._corrected(memory, message), shared, sent, took_part,
        )  # fmt: skip
        if self.kept is None:
            return after
        rest = jnp.float32(1 - self.kept)

        def without_replica(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(self._here(new, lands) & took_part, rest * new, old)

        return jax.tree.map(without_replica, after, memory)

    def between(
        self, state: PyTree, seed: jax.Array | Seeds, number: jax.Array, mean: PyTree
    ) -> PyTree:
        """What the mean of the first stage tells all clients."""
        codec = self.compression.codec
        return codec.between(self.like, self._state(state, number), self._key(seed, number), mean)

    def decode(
        self,
        state: PyTree,
        seed: jax.Array | Seeds,
        number: jax.Array,
        mean: PyTree,
        shared: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """The mean message of a step, and the public state after it."""
        codec, key = self.compression.codec, self._key(seed, number)
        own = self._state(state, number)
        decoded = codec.decode(self.like, own, key, mean, shared)
        return decoded, codec.advance(self.like, own, key, mean, shared)

    def _here(self, leaf: jax.Array, lands: jax.Array) -> jax.Array:
        """Which numbers of an array [L, ...] belong to the layers whose turn a step is."""
        fragment_L = jnp.array(fragment_of_layer(leaf.shape[0], self.fragments), jnp.int32)
        own_L = (fragment_L == self.turn(lands)).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.broadcast_to(own_L, leaf.shape)

    def _corrected(self, memory: PyTree, message: PyTree) -> PyTree:
        return feedback.corrected(memory, message) if self.compression.error_feedback else message

    def _key(self, seed: jax.Array | Seeds, lands: jax.Array) -> jax.Array:
        return key_for(seed, Purpose.COMPRESSION, lands)

    def _state(self, state: PyTree, lands: jax.Array) -> PyTree:
        """The state for a step; the turn of the layers follows from its number."""
        if self.fragments == 1:
            return state
        turn = self.turn(lands)
        return (turn, *state[1:]) if isinstance(self.compression.codec, Chain) else turn

    def turn(self, lands: jax.Array) -> jax.Array:
        """The fragment that a step takes."""
        return (lands - jnp.int32(1)) % jnp.int32(self.fragments)

    def only_its_turn(
        self, before: ServerState, after: ServerState, sent: Part, number: jax.Array
    ) -> ServerState:
        """A server step that leaves the layers alone whose turn it is not, their momentum too.

        Args:
            before: the state that was broadcast.
            after: the state that the whole mean would lead to.
            sent: what clients send, shapes are enough; the optimiser works on it as one vector.
            number: of the step.
        """
        if self.fragments == 1:
            return after

        def here(leaf: jax.Array) -> jax.Array:
            return self._here(leaf, number)

        here_P = ravel_pytree(jax.tree.map(here, sent))[0]

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(here_P, new, old) if new.shape == here_P.shape else new

        adapter = jax.tree.map(
            lambda new, old: jnp.where(here(new), new, old), after.adapter, before.adapter
        )
        optimizer = jax.tree.map(kept, after.optimizer, before.optimizer)
        return after._replace(adapter=adapter, optimizer=optimizer)
