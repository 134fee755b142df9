"""Sketches: a tenth as many random mixtures of all numbers, and back by the transpose.

Letters: P numbers of a message, M numbers sent, T = `one_in`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.compression.codec import Codec, Facts, PyTree, count, flatten, unflatten
from fedjax_llm.compression.hadamard import rotate, unrotate
from fedjax_llm.compression.strata import check_one_in, drawn, put, sampling_facts, take


@dataclass(frozen=True)
class Sketch(Codec):
    """A is a subsampled randomised Hadamard transform (arXiv 1011.1595), drawn anew each round.

    What it loses is what a random mask loses, (1 - 1/T) of the message's square; but of every
    message alike, whatever its shape, where a mask may miss all of a message that has few large
    numbers: an encoding is about as long as the message over sqrt(T).

    Why not a count sketch (FetchSGD, arXiv 2007.07682)? It finds the few numbers that stand out. In
    updates of LoRA none do, and at a tenth of the bytes the medians of its estimates are further
    from the update than zero is (measured by experiments/benchmarks/message_codecs.py). With the
    transpose as decoder it loses as much as this, but its rows are not orthonormal: it lengthens
    some messages, and error feedback on it need not converge.

    Attributes:
        one_in: T, at least 1.
        unbiased: decoded messages are multiplied by T. Not together with error feedback.
    """

    one_in: int = 10
    unbiased: bool = False

    name = "sketch"
    source = "arXiv 1011.1595"
    summary = "one of every T coordinates after a random rotation"

    def __post_init__(self) -> None:
        """Raises UserError for T below 1."""
        check_one_in(self.one_in, self.name)

    @property
    def facts(self) -> Facts:
        """A projection, or unbiased."""
        return sampling_facts(self.one_in, self.unbiased, "the span of the rows of A")

    def _encode(
        self, state: PyTree, key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> jax.Array:
        turn, mask = jax.random.split(key)
        y_P = rotate(turn, flatten(tree))
        return take(y_P, drawn(mask, count(tree), self.one_in), self.one_in)

    def decode(
        self, like: PyTree, state: PyTree, key: jax.Array, mean: jax.Array, shared: PyTree = ()
    ) -> PyTree:
        """The transpose; times T where unbiased."""
        size = count(like)
        turn, mask = jax.random.split(key)
        mean_M = mean * jnp.float32(self.one_in) if self.unbiased else mean
        y_P = put(mean_M, drawn(mask, size, self.one_in), self.one_in, size)
        return unflatten(like, unrotate(turn, y_P))
