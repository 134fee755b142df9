"""Bytes that cross a wide-area link where they are not counted as they are sent.

With an encrypted sum the uploads are real and are counted chunk by chunk. Of a sum on the devices
nothing is sent, and of a broadcast nothing but shapes is known: a number counts 4 bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.federation.message import WeightCodec

PyTree = Any
_BYTES = 4


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
    """

    rule: AggregationRule
    server: ServerState
    ranks: tuple[int, ...]
    clouds: tuple[int, ...]
    control: bool
    weighs: bool
    apart: bool
    counts: bool = False

    def up(self, phase: int, cloud: int, online: Sequence[bool]) -> int:
        """What a cloud sends under a plain sum."""
        members = self._members(cloud, online)
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
