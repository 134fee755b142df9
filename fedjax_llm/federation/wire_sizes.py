"""Bytes that cross a wide-area link where they are not counted as they are sent.

With an encrypted sum the uploads are real and are counted chunk by chunk. Of a sum on the devices
nothing is sent, and of a broadcast nothing but shapes is known: a number counts 4 bytes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.compression import Fragment, count
from fedjax_llm.federation.compressor import Compressor
from fedjax_llm.federation.message import MessageCodec, WeightCodec

PyTree = Any
_BYTES = 4


class Packed(NamedTuple):
    """Bytes of compressed messages.

    Attributes:
        up: of one message, all stages, each number in its own bits.
        down: of the opened sum in its bits, or of the layers whose turn it is; None where the
            whole adapter is sent back.
    """

    up: int
    down: int | None


def packed_sizes(compressor: Compressor, codecs: Sequence[MessageCodec], clients: int) -> Packed:
    """Bytes of the messages of a compressor.

    Args:
        compressor: of the federation.
        codecs: fixed point of each stage.
        clients: most that add up in a sum.
    """
    up = sum(-(-codec.size * codec.fixed_point.bits // 8) for codec in codecs)
    # From -n m to n m.
    widths = [(2 * clients * codec.fixed_point.max_int).bit_length() for codec in codecs]
    opened = sum(-(-codec.size * bits // 8) for codec, bits in zip(codecs, widths, strict=True))
    if compressor.compression.broadcast == "sum":
        return Packed(up, opened)
    if compressor.fragments == 1:
        return Packed(up, None)
    return Packed(up, _BYTES * count(Fragment(compressor.fragments).shapes(compressor.like)))


@dataclass(frozen=True)
class WireSizes:
    """Bytes of a round by cloud.

    Attributes:
        rule: says what is sent.
        server: shapes of the state.
        ranks: of each client.
        clouds: the cloud of each client.
        control: whether control variates travel too.
        weighs: whether weights are summed first.
        apart: whether each client's message leaves its cloud by itself.
        counts: whether a count of messages within the clip norm travels too, and the norm back.
        packed: bytes of compressed messages up and down, in place of those of whole ones.
    """

    rule: AggregationRule
    server: ServerState
    ranks: tuple[int, ...]
    clouds: tuple[int, ...]
    control: bool
    weighs: bool
    apart: bool
    counts: bool = False
    packed: Packed | None = None

    def up(self, phase: int, online_K: NDArray[np.bool_]) -> list[int]:
        """What each cloud sends under a plain sum."""
        return [self._up(phase, ranks) for ranks in self._ranks_by_cloud(online_K)]

    def down(self, phase: int, online_K: NDArray[np.bool_]) -> list[int]:
        """What each cloud receives: the next adapter, and what the stages of a round need."""
        packed = None if self.packed is None else self.packed.down
        adapters = self._adapters(phase, online_K) if packed is None else [packed] * self._count
        here = self._ranks_by_cloud(online_K)
        return [bytes_ if ranks else 0 for bytes_, ranks in zip(adapters, here, strict=True)]

    def whole(self) -> list[int]:
        """What each cloud receives that begins afresh."""
        return self._adapters(0, np.ones(len(self.clouds), bool))

    def _up(self, phase: int, ranks: Sequence[int]) -> int:
        if not ranks:
            return 0
        if self.packed is not None:
            return self.packed.up
        sizes = [self._uplink(phase, rank) for rank in ranks]
        numbers = sum(sizes) if self.apart else max(sizes)
        if self.control:
            numbers += self._control(phase)
        if self.weighs:
            numbers += WeightCodec.LIMBS
        return _BYTES * (numbers + self.counts)

    def _adapters(self, phase: int, online_K: NDArray[np.bool_]) -> list[int]:
        """The next adapter, and what the stages of a round need, for each cloud."""
        present = tuple(self._ranks_K[online_K].tolist())
        numbers = self._answers(phase) + self.weighs + self.counts
        if self.control:
            numbers += self._control(phase)

        @functools.cache
        def adapter(rank: int) -> int:
            return self.rule.downlink(self.server, phase, present, rank)

        # One download serves all clients of a cloud: the largest holds the others.
        return [
            _BYTES * (numbers + max(map(adapter, ranks), default=0))
            for ranks in self._ranks_by_cloud(online_K)
        ]

    def _ranks_by_cloud(self, online_K: NDArray[np.bool_]) -> list[list[int]]:
        """The ranks of each cloud's clients that can be reached."""
        found: list[list[int]] = [[] for _ in range(self._count)]
        for k in np.flatnonzero(online_K).tolist():
            found[self.clouds[k]].append(self.ranks[k])
        return found

    @cached_property
    def _count(self) -> int:
        return max(self.clouds) + 1

    @cached_property
    def _ranks_K(self) -> NDArray[np.int64]:
        return np.array(self.ranks)

    # What follows from shapes alone is traced once: a round asks for every client.

    @cached_property
    def _memory(self) -> dict[tuple[Any, ...], int]:
        return {}

    def _once(self, key: tuple[Any, ...], count_of: Callable[[], int]) -> int:
        if key not in self._memory:
            self._memory[key] = count_of()
        return self._memory[key]

    def _uplink(self, phase: int, rank: int) -> int:
        return self._once(
            ("uplink", phase, rank), lambda: self.rule.uplink(self.server, phase, rank)
        )

    def _answers(self, phase: int) -> int:
        return self._once(
            ("answers", phase), lambda: _numbers(self.rule.messages(self.server, phase)[1])
        )

    def _control(self, phase: int) -> int:
        return self._once(
            ("control", phase), lambda: _numbers(self.rule.trainable(self.server, phase))
        )


def _numbers(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
