"""Every transfer of a timeline: who received or sent how much, from when to when.

The cycles of a timeline say when a cloud began to receive and to send; beside them are broadcasts
to clouds that train on meanwhile, and the answers that open a sum. Here all of them are one table,
from which time on the network and money follow.

Notation: M cycles, N transfers, C clouds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds.site import Freight, Presence
from fedjax_llm.clouds.timeline import Status, Timeline

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transfers:
    """Transfers that began before the end of a run.

    Attributes:
        cloud_N: int64, place of the cloud.
        up_N: whether the cloud sends; it receives otherwise.
        start_N: seconds.
        end_N: seconds, at most the end of the run.
        size_N: bytes of the whole message, without what loss makes the link send again.
        cut_N: whether it ended before all of it was there.
        lost_N: whether it was for a cycle that was lost.
        opens_N: whether it is a part in opening a sum.
    """

    cloud_N: NDArray[np.int64]
    up_N: Bools
    start_N: Floats
    end_N: Floats
    size_N: Floats
    cut_N: Bools
    lost_N: Bools
    opens_N: Bools

    def by_cloud(self, clouds: int) -> list["Transfers"]:
        """Those of each of so many clouds."""
        order_N = np.argsort(self.cloud_N, kind="stable")
        bounds = np.searchsorted(self.cloud_N[order_N], np.arange(1, clouds))
        return [self._where(places) for places in np.split(order_N, bounds)]

    def _where(self, mask_N: NDArray[Any]) -> "Transfers":
        return Transfers(*(getattr(self, field.name)[mask_N] for field in fields(self)))


def transfers(timeline: Timeline, presences: Sequence[Presence | None]) -> Transfers:
    """All transfers of a timeline until its end.

    A cloud that is down does not receive a broadcast, and one that goes down receives a part.

    Args:
        timeline: of the run.
        presences: when each cloud is up, as the simulation had it; always if None.
    """
    end = timeline.seconds
    parts = [*_of_cycles(timeline), _of_broadcasts(timeline, presences), *_of_answers(timeline)]
    whole = _joined(parts)
    whole = whole._where(whole.start_N < end)
    return Transfers(
        whole.cloud_N, whole.up_N, whole.start_N, np.minimum(whole.end_N, end), whole.size_N,
        whole.cut_N | (whole.end_N > end), whole.lost_N, whole.opens_N,
    )  # fmt: skip


def lost_cycles(timeline: Timeline) -> Bools:
    """Which cycles came to nothing, [M].

    Those that FAILED or were LATE, and LOCAL ones of which the cloud had not sent the result when
    it went down. What is under way at the end of the run is not lost, whatever becomes of it.
    """
    table_M = timeline.table_M
    status_M, cloud_M = table_M["status"], table_M["cloud"]
    failed_M = (status_M == Status.FAILED) & (table_M["ended"] <= timeline.seconds)
    local_M = status_M == Status.LOCAL
    local_M[timeline.counted] = False
    last_C = np.full(len(timeline.names), -1)
    np.maximum.at(last_C, cloud_M[failed_M], np.flatnonzero(failed_M))
    before_M = np.arange(len(table_M)) < last_C[cloud_M]
    return failed_M | (status_M == Status.LATE) | (local_M & before_M)


def _of_cycles(timeline: Timeline) -> Iterable[Transfers]:
    """What cycles begin with receiving, and what they send."""
    table_M, lost_M = timeline.table_M, lost_cycles(timeline)
    cloud_M, version_M, ended_M = table_M["cloud"], table_M["version"], table_M["ended"]
    sizes_CxPx2 = np.array([own.sizes for own in timeline.freight], np.float64)
    phase_M = version_M % sizes_CxPx2.shape[1]
    down_M, up_M = np.moveaxis(sizes_CxPx2[cloud_M, phase_M], -1, 0)
    fresh_M = table_M["fresh"].astype(bool)
    if timeline.broadcasts:
        # Clouds keep replicas: whoever begins afresh has lost its own. Elsewhere all cycles begin
        # with what a round sends.
        whole_C = np.array([_broadcast_size(own, 0) for own in timeline.freight], np.float64)
        down_M = np.where(fresh_M, whole_C[cloud_M], down_M)

    received_M, trained_M, arrived_M = (table_M[k] for k in ("received", "trained", "arrived"))
    # A cycle that does not begin with a transfer begins to train at once.
    receives_M = fresh_M & (received_M != table_M["start"])
    yield _cycles(timeline, receives_M, False, table_M["start"], received_M, down_M, lost_M)
    # A LOCAL cycle has sent if its message came for nothing.
    stays_M = (table_M["status"] == Status.LOCAL) & np.isnan(arrived_M)
    sends_M = ~np.isnan(trained_M) & ~stays_M
    start_M = np.minimum(np.fmax(trained_M, _free(cloud_M, arrived_M)), ended_M)
    yield _cycles(timeline, sends_M, True, start_M, arrived_M, up_M, lost_M)


def _free(cloud_M: NDArray[np.int64], arrived_M: Floats) -> Floats:
    """When the message before each cycle's was there, for which a message waits; NaN for none."""
    order_M = np.argsort(cloud_M, kind="stable")
    cloud_M, arrived_M = cloud_M[order_M], arrived_M[order_M]
    places_M = np.where(np.isnan(arrived_M), -1, np.arange(len(cloud_M)))
    last_M = np.concatenate([[-1], np.maximum.accumulate(places_M)])[:-1].astype(np.int64)
    known_M = (last_M >= 0) & (cloud_M[last_M] == cloud_M)
    free_M = np.empty(len(cloud_M))
    free_M[order_M] = np.where(known_M, arrived_M[last_M], np.nan)
    return free_M


def _cycles(
    timeline: Timeline,
    mask_M: Bools,
    up: bool,
    start_M: Floats,
    end_M: Floats,
    size_M: Floats,
    lost_M: Bools,
) -> Transfers:
    table_M, cut_M = timeline.table_M, np.isnan(end_M)
    end_M = np.where(cut_M, table_M["ended"], end_M)
    count = int(mask_M.sum())
    return Transfers(
        table_M["cloud"][mask_M], np.full(count, up), start_M[mask_M], end_M[mask_M],
        size_M[mask_M], cut_M[mask_M], lost_M[mask_M], np.zeros(count, bool),
    )  # fmt: skip


def _of_broadcasts(timeline: Timeline, presences: Sequence[Presence | None]) -> Transfers:
    rows = []
    for version, starts, ends in timeline.broadcasts:
        for cloud, (start, end) in enumerate(zip(starts, ends, strict=True)):
            presence, cut = presences[cloud], False
            if start != start:
                continue
            if presence is not None:
                down = presence.next_failure(start)
                if down <= start:
                    continue
                end, cut = min(end, down), down < end
            rows.append((cloud, start, end, _broadcast_size(timeline.freight[cloud], version), cut))
    cloud_N, start_N, end_N, size_N, cut_N = np.array(rows, np.float64).reshape(-1, 5).T
    no_N = np.zeros(len(rows), bool)
    return Transfers(cloud_N.astype(np.int64), no_N, start_N, end_N, size_N, cut_N > 0, no_N, no_N)


def _broadcast_size(freight: Freight, version: int) -> int:
    if version == 0:
        return freight.sizes[0].down if freight.whole is None else freight.whole
    return freight.sizes[(version - 1) % len(freight.sizes)].down


def _of_answers(timeline: Timeline) -> Iterable[Transfers]:
    """The request and the answer, of which only the end of the latter is known."""
    table_N = np.array(timeline.answers, np.float64).reshape(-1, 4)
    count = len(table_N)
    no_N = np.zeros(count, bool)
    for up, size in ((False, timeline.opening.size.down), (True, timeline.opening.size.up)):
        yield Transfers(
            table_N[:, 0].astype(np.int64), np.full(count, up), table_N[:, 2], table_N[:, 3],
            np.full(count, float(size)), no_N, no_N, ~no_N,
        )  # fmt: skip


def _joined(parts: Sequence[Transfers]) -> Transfers:
    names = [field.name for field in fields(Transfers)]
    return Transfers(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))
