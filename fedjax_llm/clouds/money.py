"""What a run costs: rent and egress, by cloud and server step, from its timeline and prices alone.

The forecast before a run and the outcome after it are both this function, so that they differ only
where the timelines do.

Notation: N server steps, C clouds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds.cloud import Cloud
from fedjax_llm.clouds.prices import Egress, Prices
from fedjax_llm.clouds.timeline import Status, Timeline
from fedjax_llm.clouds.transfers import Transfers, lost_cycles, transfers

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bill:
    """What a run costs.

    Attributes:
        names: of the clouds.
        rent_NxC: dollars for the seconds from the version before a step to its own for which the
            cloud was up.
        egress_NxC: dollars for what a cloud sent that arrived in the step.
        up_NxC: bytes that arrived at the server in the step, of messages cut off a part.
        down_NxC: bytes that arrived at the cloud in it.
        lost_C: dollars, of those above, that went into cycles that came to nothing.
        server_rent_N: dollars for the server's machines.
        server_egress_NxC: dollars for what it sent to each cloud.
    """

    names: tuple[str, ...]
    rent_NxC: Floats
    egress_NxC: Floats
    up_NxC: Floats
    down_NxC: Floats
    lost_C: Floats
    server_rent_N: Floats
    server_egress_NxC: Floats

    @cached_property
    def clouds_NxC(self) -> Floats:
        """Dollars of each cloud in each step."""
        return self.rent_NxC + self.egress_NxC

    @cached_property
    def server_N(self) -> Floats:
        """Dollars of the server in each step."""
        return self.server_rent_N + self.server_egress_NxC.sum(axis=1)

    @property
    def dollars(self) -> float:
        """All of it."""
        return float(self.clouds_NxC.sum() + self.server_N.sum())

    @property
    def bytes(self) -> float:
        """Both ways, all clouds."""
        return float(self.up_NxC.sum() + self.down_NxC.sum())


def bill(timeline: Timeline, clouds: Sequence[Cloud]) -> Bill:
    """What a run costs that does what a timeline says.

    | what | who pays | for |
    |---|---|---|
    | rent | each cloud | the seconds from the first broadcast to the last version for which it \
is up, waiting included |
    | egress | each cloud | messages and answers, retransmissions included, by the tiers of the \
running total of its bytes |
    | rent | the server | all seconds |
    | egress | the server | broadcasts and requests, by the running total of each class of clouds |

    A transfer counts in the step in which it ends. One that a failure, a deadline or the end of the
    run cuts off counts the bytes that the link's mean goodput had carried by then. The run is one
    billing month, however long it takes.

    Args:
        timeline: of the run; of one that ended early, `Timeline.until` that step.
        clouds: in the order of the timeline, seeded as its sites were; one server serves all.
    """
    ready_N = np.array([step.ready for step in timeline.steps])
    begins_N = np.concatenate([[0.0], ready_N])[: len(ready_N)]
    moved = transfers(timeline, [cloud.presence for cloud in clouds])
    size_T = _carried(moved, clouds)
    up_NxC, down_NxC = (
        _by_step(moved, size_T * (moved.up_N == up), ready_N, len(clouds)) for up in (True, False)
    )
    up_s_NxC = np.stack([_up_seconds(cloud, begins_N, ready_N) for cloud in clouds], axis=1)
    rent_NxC = up_s_NxC * np.array([_per_second(cloud.prices) for cloud in clouds])
    egress_NxC = np.zeros_like(up_NxC)
    for c, cloud in enumerate(clouds):
        egress_NxC[:, c] = _tiered(cloud.prices.egress, cloud.link.sent_bytes(1.0) * up_NxC[:, c])
    return Bill(
        timeline.names,
        rent_NxC,
        egress_NxC,
        up_NxC,
        down_NxC,
        _lost(timeline, clouds, moved, size_T, up_NxC, egress_NxC),
        (ready_N - begins_N) * _per_second(clouds[0].server),
        _server_egress(clouds, down_NxC),
    )


def _per_second(prices: Prices) -> float:
    return prices.dollars(1.0, 0.0)


def _up_seconds(cloud: Cloud, begins_N: Floats, ends_N: Floats) -> Floats:
    if cloud.presence is None:
        return ends_N - begins_N
    seconds = cloud.presence.up_seconds
    return np.array([seconds(*span) for span in zip(begins_N, ends_N, strict=True)], np.float64)


def _carried(moved: Transfers, clouds: Sequence[Cloud]) -> Floats:
    """Bytes of each transfer that arrived."""
    mbps_Cx2 = np.array([(own.link.down.mbps, own.link.up.mbps) for own in clouds])
    rate_T = mbps_Cx2[moved.cloud_N, moved.up_N.astype(int)] * 1e6 / 8
    part_T = np.minimum(rate_T * (moved.end_N - moved.start_N), moved.size_N)
    return np.where(moved.cut_N, part_T, moved.size_N)


def _by_step(moved: Transfers, bytes_T: Floats, ready_N: Floats, clouds: int) -> Floats:
    found_NxC = np.zeros((len(ready_N), clouds))
    step_T = np.searchsorted(ready_N, moved.end_N, side="left")
    np.add.at(found_NxC, (step_T, moved.cloud_N), bytes_T)
    return found_NxC


def _tiered(egress: Egress, bytes_N: Floats) -> Floats:
    """Dollars of each step for bytes that leave in it, the tiers by those of the steps before."""
    before_N = np.cumsum(bytes_N) - bytes_N
    pairs = zip(bytes_N.tolist(), before_N.tolist(), strict=True)
    return np.array([egress.cost(*pair) if pair[0] else 0.0 for pair in pairs], np.float64)


def _lost(
    timeline: Timeline,
    clouds: Sequence[Cloud],
    moved: Transfers,
    size_T: Floats,
    up_NxC: Floats,
    egress_NxC: Floats,
) -> Floats:
    """Rent of the cycles that came to nothing, and egress at each cloud's mean price."""
    count = len(clouds)
    rows = timeline.table_M[lost_cycles(timeline)]
    # A cloud begins its next cycle while the message of one that it trained through is on its way.
    until = np.where(rows["status"] == Status.LOCAL, rows["trained"], rows["ended"])
    seconds_C = np.bincount(rows["cloud"], until - rows["start"], count)
    sent_C = np.bincount(moved.cloud_N, size_T * (moved.up_N & moved.lost_N), count)
    per_byte_C = egress_NxC.sum(axis=0) / np.maximum(up_NxC.sum(axis=0), 1.0)
    rent_C = np.array([_per_second(cloud.prices) for cloud in clouds])
    return np.asarray(seconds_C * rent_C + sent_C * per_byte_C, np.float64)


def _server_egress(clouds: Sequence[Cloud], down_NxC: Floats) -> Floats:
    """Each class of destinations has a running total of its own; clouds share it by bytes."""
    found_NxC = np.zeros_like(down_NxC)
    lossy_C = np.array([cloud.link.sent_bytes(1.0) for cloud in clouds])
    for destination, prices in {own.server.destination: own.server for own in clouds}.items():
        here_C = np.array([own.server.destination == destination for own in clouds])
        bytes_NxC = down_NxC * lossy_C * here_C
        total_N = bytes_NxC.sum(axis=1)
        dollars_N = _tiered(prices.egress, total_N)
        found_NxC += bytes_NxC * (dollars_N / np.maximum(total_N, 1.0))[:, None]
    return found_NxC
