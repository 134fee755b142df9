"""Codecs one after the other: each encodes what the one before it has made."""

from dataclasses import dataclass

import jax

from fedjax_llm.compression.codec import Codec, Facts, PyTree, shape_of
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Chain(Codec):
    """A is the product of the codecs' A, the first one's at the right; so its rows are orthonormal.

    At most one of the codecs has two stages; those before it encode once, those after it in each
    stage. A codec whose state follows the numbers that it sends comes first, or after others whose
    numbers mean the same in every round: a mask of the best coordinates of a rotation that is drawn
    anew would follow nothing. Between two stages the state stands still, so that after a codec of
    two stages there are only codecs without one.

    Attributes:
        codecs: the first encodes the message.
    """

    codecs: tuple[Codec, ...]

    name = "chain"
    source = "none"
    summary = "codecs one after the other"

    def __post_init__(self) -> None:
        """Raises UserError for codecs that do not fit each other."""
        if not self.codecs:
            raise UserError("a chain needs a codec; use identity to send everything")
        staged = [codec.name for codec in self.codecs if codec.stages > 1]
        if len(staged) > 1:
            raise UserError(f"{' and '.join(staged)} both take two sums a round; keep one of them")
        for place, codec in enumerate(self.codecs):
            if not codec.facts.keeps:
                continue
            for before in self.codecs[:place]:
                if before.stages > 1 or not before.facts.steady:
                    raise UserError(
                        f"{codec.name} keeps {codec.facts.keeps}, which means nothing after "
                        f"{before.name}; put it first, or leave one of them out"
                    )

    @property
    def stages(self) -> int:
        """Those of the codec that has two."""
        return max(codec.stages for codec in self.codecs)

    @property
    def facts(self) -> Facts:
        """What all codecs promise."""
        each = [codec.facts for codec in self.codecs]
        lossy = [facts.lossless_on for facts in each if facts.lossless_on != "everything"]
        return Facts(
            unbiased=all(facts.unbiased for facts in each),
            projects=all(facts.projects for facts in each),
            steady=all(facts.steady for facts in each),
            lossless_on="; of that, ".join(lossy) or "everything",
            keeps="; ".join(facts.keeps for facts in each if facts.keeps),
        )

    def init(self, like: PyTree) -> tuple[PyTree, ...]:
        """The states of all codecs."""
        states = []
        for codec in self.codecs:
            states.append(codec.init(like))
            like = codec.shapes(like)
        return tuple(states)

    def _encode(
        self, state: tuple[PyTree, ...], key: jax.Array, tree: PyTree, stage: int, shared: PyTree
    ) -> PyTree:
        for place, codec in enumerate(self.codecs):
            own = (stage, shared) if codec.stages > 1 else (0, ())
            tree = codec.encode(state[place], self._key(key, place, stage), tree, *own)
        return tree

    def between(
        self, like: PyTree, state: tuple[PyTree, ...], key: jax.Array, mean: PyTree
    ) -> PyTree:
        """What the codec of two stages makes of its first sum."""
        place = self._staged
        likes = self._likes(like, stage=0)
        for after in reversed(range(place + 1, len(self.codecs))):
            mean = self._decode_one(after, likes[after], state, key, mean, 0, ())
        own_key = self._key(key, place, stage=0)
        return self.codecs[place].between(likes[place], state[place], own_key, mean)

    def decode(
        self,
        like: PyTree,
        state: tuple[PyTree, ...],
        key: jax.Array,
        mean: PyTree,
        shared: PyTree = (),
    ) -> PyTree:
        """The last codec's decoding, and so on to the first."""
        return self._means(like, state, key, mean, shared)[0]

    def advance(
        self,
        like: PyTree,
        state: tuple[PyTree, ...],
        key: jax.Array,
        mean: PyTree,
        shared: PyTree = (),
    ) -> tuple[PyTree, ...]:
        """Each codec's next state from the mean of its own encodings."""
        stage = self.stages - 1
        likes, means = self._likes(like, stage), self._means(like, state, key, mean, shared)
        states = []
        for place, codec in enumerate(self.codecs):
            own_shared = shared if codec.stages > 1 else ()
            own_key = self._key(key, place, stage)
            states.append(
                codec.advance(likes[place], state[place], own_key, means[place + 1], own_shared)
            )
        return tuple(states)

    def _coordinate_bound(self, like: PyTree, norm: float, tail: float, stage: int) -> float:
        """That of the last codec, whose encoding is clipped."""
        last = self.codecs[-1]
        own_stage = stage if last.stages > 1 else 0
        return last.coordinate_bound(self._likes(like, stage)[-1], norm, tail, own_stage)

    def _least_error_bound(
        self, like: PyTree, norm: float, bits: int, clients: int, stage: int
    ) -> float:
        last = self.codecs[-1]
        own_stage = stage if last.stages > 1 else 0
        own_like = self._likes(like, stage)[-1]
        return last.least_error_bound(own_like, norm, bits, clients, own_stage)

    @property
    def _staged(self) -> int:
        (place,) = [place for place, codec in enumerate(self.codecs) if codec.stages > 1]
        return place

    def _key(self, key: jax.Array, place: int, stage: int) -> jax.Array:
        """The key of a codec; of a stage, for those after the one that has two."""
        repeats = any(codec.stages > 1 for codec in self.codecs[:place])
        return jax.random.fold_in(jax.random.fold_in(key, place), stage if repeats else 0)

    def _likes(self, like: PyTree, stage: int) -> list[PyTree]:
        """The shapes that each codec encodes."""
        likes = [shape_of(like)]
        for codec in self.codecs[:-1]:
            likes.append(codec.shapes(likes[-1], stage if codec.stages > 1 else 0))
        return likes

    def _means(
        self,
        like: PyTree,
        state: tuple[PyTree, ...],
        key: jax.Array,
        mean: PyTree,
        shared: PyTree,
    ) -> list[PyTree]:
        """What each codec encoded, in the mean and as it arrived, and the last one's encoding."""
        stage = self.stages - 1
        likes, means = self._likes(like, stage), [mean]
        for place in reversed(range(len(self.codecs))):
            means.append(
                self._decode_one(place, likes[place], state, key, means[-1], stage, shared)
            )
        return means[::-1]

    def _decode_one(
        self,
        place: int,
        like: PyTree,
        state: tuple[PyTree, ...],
        key: jax.Array,
        mean: PyTree,
        stage: int,
        shared: PyTree,
    ) -> PyTree:
        codec = self.codecs[place]
        own_shared = shared if codec.stages > 1 else ()
        return codec.decode(like, state[place], self._key(key, place, stage), mean, own_shared)
