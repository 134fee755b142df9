"""The sums between the clouds as a plan sees them: their bytes, and no keys.

`exchange.HiddenSums` are the sums of a run; what is here says the same of uploads and openings, for
virtual time before, or without, a key ceremony.
"""

from collections.abc import Sequence

from fedjax_llm.clouds.site import Opening, Size
from fedjax_llm.federation.assembly import Assembly
from fedjax_llm.federation.message import MessageCodec, WeightCodec
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.sums import (
    Bfv,
    Ckks,
    HiddenMode,
    Masked,
    Plain,
    Selective,
    SumMode,
    Threshold,
    majority,
)
from fedjax_llm.secure.sizes import SumSizes, sum_sizes

_KINDS = {Masked: "masked", Threshold: "threshold", Bfv: "bfv", Ckks: "ckks"}


class PlannedSums:
    """Sizes of the sums of a federation, one for each length of message and group of clouds.

    Args:
        mode: which kind.
        clouds: all that send.
        groups: of each cloud, where the sums of groups stay apart; one group of all if None.
        clients: most clients of a cloud.
        first: codec of the first message of a round; all sums of one kind open alike.

    Raises:
        UserError: as `HiddenSums`, when sizes are asked for.
    """

    def __init__(
        self,
        mode: HiddenMode,
        clouds: Sequence[str],
        groups: Sequence[int] | None,
        clients: int,
        first: MessageCodec,
    ) -> None:
        members = tuple(groups or (0,) * len(clouds))
        self._mode, self._clients, self._first = mode, clients, first
        # Clouds of a group, by the name of each.
        self._others = {name: members.count(own) for name, own in zip(clouds, members, strict=True)}

    def upload_bytes(self, codec: MessageCodec | type[WeightCodec], cloud: str) -> int:
        """Exact length of one upload of this cloud."""
        return sum(part.upload_bytes(cloud) for part in self._parts(codec, self._others[cloud]))

    def opening(self) -> Opening:
        """What the clouds do to open the sum of a step; see `HiddenSums.opening`."""
        hidden = self._parts(self._first, next(iter(self._others.values())))[-1]
        found = hidden.opening
        return Opening(found.parties, Size(found.bytes_down, found.bytes_up))

    def answering(self, online: int) -> int:
        """How many of the clouds that can be reached send something to open a sum.

        Masks are mended by all that are there; of key holders the server asks as many as it needs.
        """
        mode = self._mode.hidden if isinstance(self._mode, Selective) else self._mode
        return online if isinstance(mode, Masked) else min(online, self.opening().holders)

    def _parts(self, codec: MessageCodec | type[WeightCodec], clouds: int) -> list[SumSizes]:
        """Of the sums that an upload goes through: with a selection the clear one comes first."""
        (count, own), mode = codec.length, self._mode
        max_abs, parts = self._clients * own, []
        if isinstance(mode, Selective):
            clear = count - mode.selection.encrypted
            parts.append(sum_sizes("plain", clouds, clouds, clear, max_abs, clouds))
            count, mode = mode.selection.encrypted, mode.hidden
        threshold = majority(clouds) if mode.threshold is None else mode.threshold
        kind = _KINDS[type(mode)]
        parts.append(sum_sizes(kind, clouds, threshold, count, max_abs, clouds))
        return parts


def planned_sums(mode: SumMode, parts: Assembly, roster: Roster) -> PlannedSums | None:
    """The sums between the clouds of a federation; None for a sum on the devices.

    Args:
        mode: which kind.
        parts: codecs and groups.
        roster: the clients.
    """
    if isinstance(mode, Plain):
        return None
    most = max(len(roster.members(cloud)) for cloud in range(len(roster.clouds)))
    return PlannedSums(mode, roster.names, parts.groups, most, parts.codecs[0][0])
