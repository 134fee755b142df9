"""What a round measured, as the federation reports it to whoever runs it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.clouds.cloud import Cloud
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.exchange import Ledger
from fedjax_llm.federation.tables import Participant
from fedjax_llm.federation.virtual import spent_in
from fedjax_llm.training import ClientMetrics


@dataclass(frozen=True)
class CloudReport:
    """One cloud's part of a round.

    Attributes:
        online: whether it could be reached in this round.
        lands: whether a message of it entered the sum.
        loss_train_nats: mean loss of the rows it trained on, None if it trained on none. Measured
            by the simulator; no privacy guarantee covers it.
        rows: rows that its clients trained on over all local steps.
        uplink_bytes: what it sent: its message and its part in the decryption.
        downlink_bytes: what it received: the adapter and its part in the decryption.
        seconds_link: virtual seconds of its link for the message that landed.
        seconds_train: virtual seconds of the training behind it.
        dollars: rent since the step before, waiting included, and egress; see `clouds.money`.
    """

    online: bool
    lands: bool
    loss_train_nats: float | None
    rows: int
    uplink_bytes: int
    downlink_bytes: int
    seconds_link: float
    seconds_train: float
    dollars: float


@dataclass(frozen=True)
class RoundReport:
    """One round.

    Attributes:
        round: from 1.
        clouds: by name, in the order of the run.
        tokens: positions that went through the model in training, padding included.
        update_norm: l2 norm of the mean update, before the server's optimiser.
        aggregation_error: Frobenius distance between the product that the rule made and the mean of
            the clients' products as they trained them, over the norm of the latter: what rule,
            clipping, rounding and noise changed. Measured by the simulator, which sees all clients;
            NaN for rules without a mean (personal adapters, robust combinations) or not measured.
        clipped_fraction: rows whose gradient was clipped over rows (unit `example`), else clouds
            whose message was shortened over clouds.
        clouds_diverged: clouds whose update was not finite and entered the sum as zeros; above 0
            with privacy unit `client` alone, whose guarantee does not cover this number.
        seconds: measured wall-clock seconds by stage: train, encrypt, add, decrypt, apply.
        seconds_virtual: simulated seconds from the version before to this one.
        dollars_server: what the server pays in them.
        clients_at_once: that ran in one vmap on a device.
    """

    round: int
    clouds: Mapping[str, CloudReport]
    tokens: int
    update_norm: float
    aggregation_error: float
    clipped_fraction: float
    clouds_diverged: int
    seconds: Mapping[str, float]
    seconds_virtual: float
    dollars_server: float
    clients_at_once: int

    @property
    def uplink_bytes(self) -> int:
        """Bytes of all clouds towards the server."""
        return sum(cloud.uplink_bytes for cloud in self.clouds.values())

    @property
    def downlink_bytes(self) -> int:
        """Bytes of the server towards all clouds."""
        return sum(cloud.downlink_bytes for cloud in self.clouds.values())

    @property
    def dollars(self) -> float:
        """Of all clouds and the server."""
        return self.dollars_server + sum(cloud.dollars for cloud in self.clouds.values())

    @property
    def loss_train_nats(self) -> float | None:
        """Mean over the rows of all clouds."""
        trained = [c for c in self.clouds.values() if c.loss_train_nats is not None]
        rows = sum(cloud.rows for cloud in trained)
        if not rows:
            return None
        return sum((cloud.loss_train_nats or 0.0) * cloud.rows for cloud in trained) / rows


def report(
    *,
    number: int,
    participants: Sequence[Participant],
    clouds: Sequence[Cloud],
    cloud_K: Sequence[int],
    online: Sequence[str],
    metrics: ClientMetrics,
    norms_K: np.ndarray,
    private: bool,
    max_norm: float,
    update_norm: float,
    error: float,
    ledger: Ledger,
    calendar: Calendar,
    clients_at_once: int,
) -> RoundReport:
    """Puts a round's measurements together, the clients of a cloud as one.

    Args:
        number: of the round, from 1.
        participants: the clients.
        clouds: in order.
        cloud_K: the cloud of each client.
        online: clouds that could be reached.
        metrics: of the clients, with padding.
        norms_K: of their messages before clipping.
        private: whether examples were clipped.
        max_norm: of a message.
        update_norm: see `RoundReport`.
        error: see `RoundReport.aggregation_error`.
        ledger: bytes and seconds.
        calendar: virtual time and money.
        clients_at_once: see `RoundReport`.
    """
    count = len(participants)
    rows_K, losses_K = (np.asarray(x, np.float64)[:count] for x in (metrics.rows, metrics.loss_sum))
    places = np.asarray(cloud_K)
    all_rows = max(float(rows_K.sum()), 1.0)
    rows = {cloud.name: float(rows_K[places == c].sum()) for c, cloud in enumerate(clouds)}
    spent = spent_in(calendar, number)
    landed = calendar.timeline.landing(number)
    found = {}
    for c, cloud in enumerate(clouds):
        name = cloud.name
        loss = float(losses_K[places == c].sum())
        found[name] = CloudReport(
            name in online,
            c in landed,
            loss / rows[name] if rows[name] else None,
            int(rows[name]),
            ledger.sent[name],
            ledger.received[name],
            spent[c].link,
            spent[c].train,
            spent[c].dollars,
        )
    if private:
        clipped = float(np.asarray(metrics.clipped)[:count].sum()) / all_rows
    else:
        reached = sum(clouds[c].name in online for c in cloud_K)
        clipped = float((norms_K > max_norm).sum()) / reached
    length = participants[0].train.tokens_BxT.shape[1]
    return RoundReport(
        round=number,
        clouds=found,
        tokens=int(rows_K.sum()) * length,
        update_norm=update_norm,
        aggregation_error=error if math.isfinite(error) else math.nan,
        clipped_fraction=clipped,
        clouds_diverged=int(np.sum(~np.isfinite(norms_K))),
        seconds=ledger.seconds,
        seconds_virtual=calendar.timeline.between(number),
        dollars_server=float(calendar.bill.server_N[number - 1]),
        clients_at_once=clients_at_once,
    )
