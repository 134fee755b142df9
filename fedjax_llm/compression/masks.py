"""Masks that follow from public things alone: all clients send the same coordinates.

Letters: P numbers of a message, M numbers sent, T = `one_in`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression.codec import Codec, Facts, PyTree, count, flatten, unflatten
from fedjax_llm.compression.strata import (
    check_one_in,
    drawn,
    put,
    sampling_facts,
    strata,
    take,
)
from fedjax_llm.errors import UserError

_INSIDE = "what is zero outside of the mask"


@dataclass(frozen=True)
class RandomMask(Codec):
    """A is one row of the identity from every T neighbours, drawn anew each round.

    Random-k of arXiv 1809.07599 with the k spread evenly. The expected square of what is lost is
    (1 - 1/T) of the message's; made unbiased by a factor of T, it is T - 1 times the message's.

    Attributes:
        one_in: T, at least 1.
        unbiased: decoded numbers are multiplied by T. Not together with error feedback.
    """

    one_in: int = 10
    unbiased: bool = False

    name = "random-mask"
    source = "arXiv 1809.07599"
    summary = "one of every T numbers, drawn anew each round"

    def __post_init__(self) -> None:
        """Raises UserError for T below 1."""
        check_one_in(self.one_in, self.name)

    @property
    def facts(self) -> Facts:
        """A projection, or unbiased."""
        return sampling_facts(self.one_in, self.unbiased, _INSIDE)

    def _encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> jax.Array:
        return take(flatten(tree), drawn(key, count(tree), self.one_in), self.one_in)

    def decode(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> PyTree:
        """The numbers at their places, zeros elsewhere."""
        size = count(like)
        mean_M = mean * jnp.float32(self.one_in) if self.unbiased else mean
        return unflatten(like, put(mean_M, drawn(key, size, self.one_in), self.one_in, size))


@dataclass(frozen=True)
class TurnMask(Codec):
    """A is one row of the identity from every T neighbours, each in its turn.

    After T rounds every number has been sent exactly once, so that error feedback waits T rounds
    and no longer, where a random mask leaves a number out for T rounds with probability 0.35. On
    updates of LoRA, which are far from sparse, it is the best mask with error feedback (measured
    in this folder's README).

    Attributes:
        one_in: T, at least 1.
    """

    one_in: int = 10

    name = "turn-mask"
    source = "arXiv 1809.07599, with the mask in turn"
    summary = "one of every T numbers, each once in T rounds"

    def __post_init__(self) -> None:
        """Raises UserError for T below 1."""
        check_one_in(self.one_in, self.name)

    @property
    def facts(self) -> Facts:
        """A projection."""
        facts = sampling_facts(self.one_in, False, _INSIDE)
        return replace(facts, keeps="how many rounds have been")

    def init(self, like: PyTree) -> jax.Array:
        """The number of rounds so far, int32."""
        return jnp.int32(0)

    def _encode(
        self, state: jax.Array, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> jax.Array:
        return take(flatten(tree), self._places(state, count(tree)), self.one_in)

    def decode(
        self, like: PyTree, state: jax.Array, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> PyTree:
        """The numbers at their places, zeros elsewhere."""
        size = count(like)
        return unflatten(like, put(mean, self._places(state, size), self.one_in, size))

    def advance(
        self, like: PyTree, state: jax.Array, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> jax.Array:
        """One round more."""
        return (state + 1) % jnp.int32(self.one_in)

    def _places(self, rounds: jax.Array, size: int) -> jax.Array:
        # Any fixed start will do but the same for all strata: a message's numbers lie in an order
        # that repeats, and one that divides T would send one rank of every factor at a time.
        start_M = drawn(jax.random.key(0), size, self.one_in)
        return (start_M + rounds) % jnp.int32(self.one_in)


class Scores(NamedTuple):
    """What a `TopMask` knows of each number, all [P].

    Attributes:
        rate: float32, the mean's absolute value when it was last sent, divided by its age then;
            -1 for what has not been sent.
        age: int32, rounds since it was sent, this one included.
        order: int32, the numbers' places, the highest score first.
    """

    rate_P: jax.Array
    age_P: jax.Array
    order_P: jax.Array


@dataclass(frozen=True)
class TopMask(Codec):
    """A is the rows of the identity with the highest public scores, and some at random.

    The score guesses how much has gathered behind a number: its rate, the mean's absolute value
    when it was last sent over the rounds that this had gathered for, times the rounds since. What
    has not been sent comes first. Scores see nothing but means, so that they cost no privacy and
    no bytes. A plain sum of absolute values as score would not do with error feedback: what was
    never sent scores zero, however much has gathered behind it.

    Top-k of each client (arXiv 1809.07599) keeps more of one message, but clients choose different
    places, which do not add up and tell where their data is large.

    Attributes:
        one_in: T, at least 1; ceil(P / T) numbers are sent.
        explore: share of them that is drawn at random from the rest, in [0, 1].
    """

    one_in: int = 10
    explore: float = 0.1

    name = "top-mask"
    source = "after arXiv 1809.07599"
    summary = "the numbers with the highest public scores, and some at random"

    def __post_init__(self) -> None:
        """Raises UserError for settings out of range."""
        check_one_in(self.one_in, self.name)
        if not 0 <= self.explore <= 1:
            raise UserError(f"explore must be in [0, 1], got {self.explore:g}; 0.1 is usual")

    @property
    def facts(self) -> Facts:
        """A projection."""
        facts = sampling_facts(self.one_in, False, _INSIDE)
        return replace(facts, keeps="rate, age and order of all numbers, 12 bytes each")

    def init(self, like: PyTree) -> Scores:
        """Nothing has been sent; the order is random."""
        size = count(like)
        # Any fixed order will do but that of memory, which would begin with the first layer alone.
        order_P = jax.random.permutation(jax.random.key(0), jnp.arange(size, dtype=jnp.int32))
        return Scores(jnp.full(size, -1, jnp.float32), jnp.ones(size, jnp.int32), order_P)

    def _encode(
        self, state: Scores, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> jax.Array:
        return flatten(tree)[self._chosen(state, key)]

    def decode(
        self, like: PyTree, state: Scores, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> PyTree:
        """The numbers at their places, zeros elsewhere."""
        places_M = self._chosen(state, key)
        flat_P = jnp.zeros(count(like), jnp.float32).at[places_M].set(mean, unique_indices=True)
        return unflatten(like, flat_P)

    def advance(
        self, like: PyTree, state: Scores, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> Scores:
        """Scores with what this round has shown."""
        places_M = self._chosen(state, key)
        age_M = state.age_P[places_M].astype(jnp.float32)
        rate_P = state.rate_P.at[places_M].set(jnp.abs(mean) / age_M, unique_indices=True)
        age_P = (state.age_P + 1).at[places_M].set(1, unique_indices=True)
        score_P = jnp.where(rate_P < 0, jnp.float32(jnp.inf), rate_P * age_P.astype(jnp.float32))
        # Stable, so that what scores alike stays in its random order.
        best_P = jnp.argsort(score_P[state.order_P], stable=True, descending=True)
        return Scores(rate_P, age_P, state.order_P[best_P])

    def _chosen(self, state: Scores, key: jax.Array) -> jax.Array:
        """The places that are sent, int32 [M], each once."""
        size = state.order_P.shape[0]
        sent = strata(size, self.one_in)
        drawn_at_random = round(self.explore * sent)
        best = sent - drawn_at_random
        rest = size - best
        # One of every stratum of the rest, so that no place comes twice.
        edges = best + np.arange(drawn_at_random + 1) * rest // max(drawn_at_random, 1)
        low, high = (jnp.asarray(edge, jnp.int32) for edge in (edges[:-1], edges[1:]))
        others = jax.random.randint(key, (drawn_at_random,), low, high, jnp.int32)
        return state.order_P[jnp.concatenate([jnp.arange(best, dtype=jnp.int32), others])]
