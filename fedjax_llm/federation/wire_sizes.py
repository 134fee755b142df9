"""Bytes that cross a wide-area link where they are not counted as they are sent.

With an encrypted sum the uploads are real and are counted chunk by chunk. Of a sum on the devices
nothing is sent, and of a broadcast nothing but shapes is known: a number counts 4 bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

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

    def up(self, phase: int, cloud: int, online: Sequence[bool]) -> int:
        """What a cloud sends under a plain sum."""
        members = self._members(cloud, online)
        if self.packed is not None:
            return self.packed.up if members else 0
        sizes = [self.rule.uplink(self.server, phase, self.ranks[k]) for k in members]
        numbers = sum(sizes) if self.apart else max(sizes, default=0)
        if self.control and members:
            numbers += self._control(phase)
        if self.weighs and members:
            numbers += WeightCodec.LIMBS
        if self.counts and members:
            numbers += 1
        return _BYTES * numbers

    def down(self, phase: int, cloud: int, online: Sequence[bool]) -> int:
        """What a cloud receives: the next adapter, and what the stages of a round need."""
        members = self._members(cloud, online)
        if not members:
            return 0
        if self.packed is not None and self.packed.down is not None:
            return self.packed.down
        return self._adapter(phase, members, online)

    def whole(self, cloud: int) -> int:
        """What a cloud receives that begins afresh."""
        online = [True] * len(self.clouds)
        return self._adapter(0, self._members(cloud, online), online)

    def _adapter(self, phase: int, members: Sequence[int], online: Sequence[bool]) -> int:
        """The next adapter, and what the stages of a round need."""
        ranks = tuple(rank for rank, here in zip(self.ranks, online, strict=True) if here)
        # One download serves all clients of a cloud: the largest holds the others.
        numbers = max(self.rule.downlink(self.server, phase, ranks, self.ranks[k]) for k in members)
        answers = self.rule.messages(self.server, phase)[1]
        numbers += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(answers))
        if self.control:
            numbers += self._control(phase)
        numbers += self.weighs + self.counts
        return _BYTES * numbers

    def _members(self, cloud: int, online: Sequence[bool]) -> list[int]:
        return [
            k
            for k, (own, here) in enumerate(zip(self.clouds, online, strict=True))
            if own == cloud and here
        ]

    def _control(self, phase: int) -> int:
        part = self.rule.trainable(self.server, phase)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
