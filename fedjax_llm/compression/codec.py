"""A codec is a matrix that all clients of a round share: fewer numbers, and sums stay sums.

    encode  y = A x     at each client; A has orthonormal rows and follows from public things alone
    sum     the y of all clients are added, in the plain or under encryption
    decode  x' = A' y   at the server, of the mean

A depends on the codec's public state and on the round's public key, never on a client's data. So
encodings of sums are sums of encodings; no encoding is longer than what it encodes, and a clip norm
that held before holds after; and what is lost, x - A'A x, is at right angles to what arrives.
Identity, rotation, masks, sketches and fragments are such matrices, and so is the second stage of
PowerSGD; some of them decode with a factor that makes the result unbiased instead.

Letters: K clients, P numbers of a message, M numbers of its encoding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError

PyTree = Any


@dataclass(frozen=True)
class Facts:
    """What a codec promises; the contract suite tests it.

    Attributes:
        unbiased: the mean over the key of decode(encode(x)) is x.
        projects: decode after encode is an orthogonal projection: doing it twice is doing it once,
            and the residual is at right angles to the rest and no longer than x. Error feedback
            needs this (arXiv 1901.09847, assumption A, holds with it).
        steady: a number that is sent means the same in every round.
        lossless_on: the x with decode(encode(x)) = x, in words.
        keeps: what the state holds, in words; "" for none.
    """

    unbiased: bool
    projects: bool
    steady: bool
    lossless_on: str
    keeps: str = ""


@dataclass(frozen=True)
class Codec(ABC):
    """Pure functions that shorten what clients send. All work under `jit`; `encode` under `vmap`.

    Every method takes the codec's `state`, the same for server and clients, and the round's public
    `key`. `like` is a tree of arrays, or of their shapes, like the message; it is static. Messages
    and encodings are pytrees of float32 arrays.

    A round of two stages plays `encode(stage=0)`, a sum, `between`, `encode(stage=1)`, a sum,
    `decode`; of one stage, the last three.

    The state has one author. Whoever else needs it takes its bytes and does not compute it anew:
    float32 may round otherwise on another machine, and a mask that differs in one place is another
    mask.

    | message | encoding |
    |---|---|
    | all zeros | all zeros |
    | NaN or infinity anywhere, sent or not | all NaN, so that no mask hides it |
    | finite, but a sum leaves float32's range | not finite |

    Class attributes:
        name: the name in `CODECS`.
        source: the paper.
        summary: one line.
        stages: sums of a round, 1 or 2.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]

    @property
    def stages(self) -> int:
        """Sums of a round."""
        return 1

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What holds for a codec with these settings."""

    def init(self, like: PyTree) -> PyTree:
        """The state before the first round.

        Raises:
            UserError: the settings do not fit messages like this.
        """
        del like
        return ()

    def encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int = 0, shared: PyTree = ()
    ) -> PyTree:
        """One client's encoding, for one stage; linear in `tree`.

        Args:
            state: of the codec.
            key: of the round.
            tree: the message, float32.
            stage: static.
            shared: what `between` gave; () in stage 0.

        Raises:
            UserError: the message is not of float32 arrays.
        """
        finite = _all_finite(tree)
        coded = self._encode(state, key, tree, stage, shared)
        return jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.float32(jnp.nan)), coded)

    @abstractmethod
    def _encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> PyTree:
        """`encode` of a finite message."""

    def between(self, like: PyTree, state: PyTree, key: jax.Array, mean: PyTree) -> PyTree:
        """What the mean of the encodings of stage 0 tells all clients."""
        del like, state, key, mean
        return ()

    @abstractmethod
    def decode(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: PyTree, shared: PyTree = ()
    ) -> PyTree:
        """The mean message from the mean of the last stage's encodings; linear in `mean`."""

    def advance(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: PyTree, shared: PyTree = ()
    ) -> PyTree:
        """The state for the next round; arguments as those of `decode`."""
        del like, key, mean, shared
        return state

    def residual(
        self,
        state: PyTree,
        key: jax.Array,
        tree: PyTree,
        shared: PyTree = (),
        sent: PyTree | None = None,
    ) -> PyTree:
        """What of this client's own message does not arrive, for error feedback.

        Args:
            state: of the codec.
            key: of the round.
            tree: the message, as it was encoded.
            shared: what `between` gave.
            sent: the encoding of the last stage as it left the client, clipped or rounded;
                `encode`'s own if None.
        """
        if sent is None:
            sent = self.encode(state, key, tree, self.stages - 1, shared)
        arrived = self.decode(tree, state, key, sent, shared)
        return jax.tree.map(jnp.subtract, tree, arrived)

    def shapes(self, like: PyTree, stage: int = 0) -> PyTree:
        """The shapes of a stage's encoding."""

        def play(tree: PyTree, key: jax.Array) -> PyTree:
            state, shared = self.init(like), ()
            if stage > 0:
                shared = self.between(like, state, key, self.encode(state, key, tree))
            return self.encode(state, key, tree, stage, shared)

        return jax.eval_shape(play, shape_of(like), jax.eval_shape(jax.random.key, 0))

    def size(self, like: PyTree, stage: int = 0) -> int:
        """M, the numbers of a stage's encoding."""
        return count(self.shapes(like, stage))

    def coordinate_bound(
        self, like: PyTree, norm: float, tail: float = 0.0, stage: int = 0
    ) -> float:
        """How far fixed point has to reach for encodings that are clipped to an l2 norm.

        Formal guarantee: for every message that does not depend on the round's key, all numbers of
        its encoding, clipped to `norm`, are at most this in absolute value, but for a probability
        of at most `tail` over the key. So `tail` bounds how often a client's round is cut by
        coordinate, which shortens what is sent and biases it.

        Args:
            like: the message.
            norm: l2 norm of the clipped encoding, above 0.
            tail: in [0, 1).
            stage: static.

        Raises:
            UserError: a norm or tail out of range.
        """
        if not 0 < norm < math.inf:
            raise UserError(f"the norm must be above 0 and finite, got {norm:g}; give a clip norm")
        if not 0 <= tail < 1:
            raise UserError(f"tail must be in [0, 1), got {tail:g}; 1e-6 is usual")
        return self._coordinate_bound(like, norm, tail, stage)

    def least_error_bound(
        self, like: PyTree, norm: float, bits: int, clients: int, stage: int = 0
    ) -> float:
        """Where to cut coordinates so that a mean of few bits has the least error.

        Cutting the largest numbers a little lets the step be finer for all; a bound that is passed
        next to never costs three times the error with 4 bits. No promise comes with it but that
        cutting never lengthens: how much is cut depends on the messages, and error feedback on what
        was `sent` makes up for it.

        Args:
            like: the message.
            norm: l2 norm of the clipped encoding.
            bits: of stochastic rounding.
            clients: of the mean, whose rounding errors average out where cuts do not.
            stage: static.

        Returns:
            At most `norm`, which it is for codecs that do not spread their numbers evenly.
        """
        return self._least_error_bound(
            like, self.coordinate_bound(like, norm), bits, clients, stage
        )

    def _coordinate_bound(self, like: PyTree, norm: float, tail: float, stage: int) -> float:
        """One coordinate may be all of a vector."""
        del like, tail, stage
        return norm

    def _least_error_bound(
        self, like: PyTree, norm: float, bits: int, clients: int, stage: int
    ) -> float:
        """As `_coordinate_bound`."""
        del like, bits, clients, stage
        return norm


def count(tree: PyTree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shape_of(tree: PyTree) -> PyTree:
    """The shapes of a tree, float32."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), tree)


def flatten(tree: PyTree) -> jax.Array:
    """All numbers of a tree of float32 arrays, [P]."""
    leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros(0, jnp.float32)


def unflatten(like: PyTree, flat_P: jax.Array) -> PyTree:
    """The inverse of `flatten`."""
    leaves, structure = jax.tree.flatten(like)
    arrays, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        arrays.append(flat_P[start : start + size].reshape(leaf.shape))
        start += size
    return jax.tree.unflatten(structure, arrays)


def _all_finite(tree: PyTree) -> jax.Array:
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype != jnp.float32:
            raise UserError(f"a message holds {leaf.dtype}; cast it to float32 before encoding it")
        finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite
