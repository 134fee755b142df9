"""What a round measured, as the federation reports it to whoever runs it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CloudReport:
    """One cloud's part of a round.

    Attributes:
        online: whether it could be reached in this round.
        loss_train_nats: mean loss of the rows it trained on, None if it trained on none. Measured
            by the simulator; no privacy guarantee covers it.
        rows: rows it trained on over all local steps.
        uplink_bytes: what it sent: its message and its part in the decryption.
        downlink_bytes: what it received: the adapter and its part in the decryption.
        seconds_link: simulated seconds of its link for these bytes.
    """

    online: bool
    loss_train_nats: float | None
    rows: int
    uplink_bytes: int
    downlink_bytes: int
    seconds_link: float


@dataclass(frozen=True)
class RoundReport:
    """One round.

    Attributes:
        round: from 1.
        clouds: by name, in the order of the run.
        tokens: positions that went through the model in training, padding included.
        update_norm: l2 norm of the change of the global adapter.
        clipped_fraction: rows whose gradient was clipped over rows (unit `example`), else clouds
            whose message was shortened over clouds.
        clouds_diverged: clouds whose update was not finite and entered the sum as zeros; above 0
            with privacy unit `client` alone, whose guarantee does not cover this number.
        seconds: measured wall-clock seconds by stage: train, encrypt, add, decrypt, apply.
        seconds_virtual: simulated seconds until the slowest cloud's message is there: its links
            and its share of the measured training time.
    """

    round: int
    clouds: Mapping[str, CloudReport]
    tokens: int
    update_norm: float
    clipped_fraction: float
    clouds_diverged: int
    seconds: Mapping[str, float]
    seconds_virtual: float

    @property
    def uplink_bytes(self) -> int:
        """Bytes of all clouds towards the server."""
        return sum(cloud.uplink_bytes for cloud in self.clouds.values())

    @property
    def downlink_bytes(self) -> int:
        """Bytes of the server towards all clouds."""
        return sum(cloud.downlink_bytes for cloud in self.clouds.values())

    @property
    def loss_train_nats(self) -> float | None:
        """Mean over the rows of all clouds."""
        trained = [c for c in self.clouds.values() if c.loss_train_nats is not None]
        rows = sum(cloud.rows for cloud in trained)
        if not rows:
            return None
        return sum((cloud.loss_train_nats or 0.0) * cloud.rows for cloud in trained) / rows
