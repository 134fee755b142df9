"""A cloud's network link, and the virtual time of a synchronous round over such links."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedjax_llm.clouds.draws import Uniforms
from fedjax_llm.clouds.goodput import loss_limit_mbps
from fedjax_llm.clouds.rates import Rate
from fedjax_llm.errors import UserError


class Path:
    """One direction of a link, worked out: what a transfer of so many bytes takes.

    A transfer's last byte leaves when the goodput has carried all of them, and arrives one latency
    and one jitter later. Transfers over one path do not share its bandwidth.
    """

    __slots__ = ("_bits_per_s", "_jitter_s", "_latency_s", "_rate", "_uniform", "mbps")

    def __init__(
        self,
        goodput: float | Rate,
        latency_s: float,
        jitter_s: float = 0.0,
        uniform: Uniforms | None = None,
    ) -> None:
        """Takes what a transfer depends on.

        Args:
            goodput: megabits per second that arrive, or a rate over time; `mbps` is its mean.
            latency_s: one way, seconds.
            jitter_s: mean of the random part of the latency, seconds.
            uniform: where that is drawn from; needed if it is not zero.
        """
        self._rate = goodput if isinstance(goodput, Rate) else None
        self.mbps = goodput.mean_mbps if isinstance(goodput, Rate) else goodput
        self._bits_per_s = self.mbps * 1e6
        self._latency_s, self._jitter_s = latency_s, jitter_s
        self._uniform = uniform if jitter_s else None

    def seconds(self, size: float, start_s: float = 0.0, index: int = 0) -> float:
        """Seconds from the start of a transfer to its arrival.

        Args:
            size: bytes, zero or more.
            start_s: when it starts; only a rate over time depends on it.
            index: of the transfer, which addresses its jitter.

        Raises:
            ValueError: `size` is negative.
        """
        if self._rate is None:
            return self.finish(0.0, size, index)
        return self.finish(start_s, size, index) - start_s

    def finish(self, start_s: float, size: float, index: int = 0) -> float:
        """When a transfer that starts at `start_s` has arrived; see `seconds`."""
        if size < 0:
            raise ValueError(f"bytes must be zero or more, got {size}")
        wait = self._latency_s
        if self._uniform is not None:
            wait -= self._jitter_s * math.log(self._uniform(index))
        if self._rate is None:
            return start_s + (wait + size * 8 / self._bits_per_s)
        return self._rate.finish(start_s, size * 8e-6) + wait


@dataclass(frozen=True)
class Link:
    """The wide-area link between a cloud and the server.

    Jitter is exponential: it is what queues add to the latency, and the time in a queue with random
    arrivals and service (M/M/1) is exponential; it has one parameter and is never negative.

    Attributes:
        up_mbps: bandwidth from the cloud, in megabits (10^6 bits) per second; the
            mean of `up_rate`, if that is given.
        down_mbps: bandwidth to the cloud, the same.
        latency_ms: one-way latency in milliseconds, paid once per transfer.
        jitter_ms: mean of what is added at random to the latency of each transfer.
        loss: part of the packets that is lost, in [0, 1); see `goodput`. The round trip that it
            counts with is twice latency and mean jitter.
        streams: parallel TCP connections of a transfer, each of which loss slows by itself.
        up_rate: bandwidth from the cloud over time.
        down_rate: the same to the cloud.
        seed: of the simulation; with `cloud` the address of all jitter. `Cloud.seeded` sets both.
        cloud: its name.

    Raises:
        UserError: a bandwidth is not positive and finite, the latency or jitter not finite or
            negative, loss outside [0, 1), no stream.
    """

    up_mbps: float
    down_mbps: float
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    streams: int = 1
    up_rate: Rate | None = None
    down_rate: Rate | None = None
    seed: int = 0
    cloud: str = ""

    def __post_init__(self) -> None:
        for name in ("up_mbps", "down_mbps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(
                    f"{name} must be positive and finite, got {value}; a link that is down for a "
                    "while has a rate over time with 0 in it"
                )
        for name in ("latency_ms", "jitter_ms"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be zero or more and finite, got {value}")
        if not 0 <= self.loss < 1:
            raise UserError(f"loss must be zero or more and below 1, got {self.loss}; 1 % is 0.01")
        if self.streams < 1:
            raise UserError(f"streams must be at least 1, got {self.streams}")
        for name in ("up", "down"):
            rate, mbps = getattr(self, f"{name}_rate"), getattr(self, f"{name}_mbps")
            if rate is not None and not math.isclose(mbps, rate.mean_mbps):
                raise UserError(
                    f"{name}_mbps must be the mean of {name}_rate, {rate.mean_mbps:g}, got "
                    f"{mbps:g}; make the link with Link.over_time"
                )

    @classmethod
    def over_time(cls, up: float | Rate, down: float | Rate, **others: Any) -> "Link":
        """A link with a constant bandwidth or a rate over time each way, and other attributes."""
        values: dict[str, Any] = dict(others)
        for name, rate in (("up", up), ("down", down)):
            values[f"{name}_mbps"] = rate.mean_mbps if isinstance(rate, Rate) else rate
            values[f"{name}_rate"] = rate if isinstance(rate, Rate) else None
        return cls(**values)

    @cached_property
    def up(self) -> Path:
        """From the cloud to the server."""
        return self._path("up", self.up_rate or self.up_mbps)

    @cached_property
    def down(self) -> Path:
        """From the server to the cloud."""
        return self._path("down", self.down_rate or self.down_mbps)

    def _path(self, direction: str, rate: float | Rate) -> Path:
        rtt_s = 2 * (self.latency_ms + self.jitter_ms) / 1e3
        limit = loss_limit_mbps(rtt_s, self.loss, self.streams)
        # Of what is sent, the part 1 - loss arrives; the rest is sent again.
        share = 1.0 - self.loss
        if isinstance(rate, Rate):
            goodput: float | Rate = rate.limited(limit, share) if self.loss else rate
        else:
            goodput = min(rate, limit) * share
        uniform = Uniforms(self.seed, f"jitter {direction}", self.cloud)
        return Path(goodput, self.latency_ms / 1e3, self.jitter_ms / 1e3, uniform)

    def sent_bytes(self, size: float) -> float:
        """Bytes on the wire for `size` bytes that arrive, with all that is sent again."""
        return size / (1.0 - self.loss)

    def seconds_up(self, size: int, start_s: float = 0.0, index: int = 0) -> float:
        """Seconds to send `size` bytes from the cloud to the server; see `Path.seconds`.

        >>> Link(up_mbps=8.0, down_mbps=80.0, latency_ms=500.0).seconds_up(1_000_000)
        1.5
        """
        return self.up.seconds(size, start_s, index)

    def seconds_down(self, size: int, start_s: float = 0.0, index: int = 0) -> float:
        """Seconds to send `size` bytes from the server to the cloud; see `Path.seconds`."""
        return self.down.seconds(size, start_s, index)


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a synchronous round, per cloud, in the stages a cloud goes through."""

    down: Mapping[str, float]
    train: Mapping[str, float]
    up: Mapping[str, float]

    @property
    def per_cloud(self) -> dict[str, float]:
        """Seconds from the broadcast to the arrival of each cloud's message."""
        return {name: self.down[name] + self.train[name] + self.up[name] for name in self.train}

    @property
    def seconds(self) -> float:
        """Seconds of the whole round: the server waits for the slowest cloud; 0 without clouds."""
        return max(self.per_cloud.values(), default=0.0)

    @property
    def slowest(self) -> str | None:
        """The cloud that the round waited for; the first of the run on a tie."""
        times = self.per_cloud
        return max(times, key=lambda name: times[name]) if times else None


def round_seconds(
    links: Mapping[str, Link],
    bytes_down: Mapping[str, int],
    train_seconds: Mapping[str, float],
    bytes_up: Mapping[str, int],
) -> RoundTime:
    """Virtual time of a round in which each cloud downloads, trains, then uploads.

    Args:
        links: the link of every cloud of the run, by name.
        bytes_down: bytes broadcast to each cloud that takes part.
        train_seconds: measured seconds of local work of each cloud that takes part.
        bytes_up: bytes each of them uploads.

    Returns:
        The stages of every cloud in `train_seconds`; clouds that sat out are not in it.

    Raises:
        ValueError: the mappings do not name the same clouds, or one has no link.
    """
    names = tuple(name for name in links if name in train_seconds)
    if not set(train_seconds) == set(bytes_down) == set(bytes_up) == set(names):
        raise ValueError("bytes_down, train_seconds and bytes_up must name the same known clouds")
    for name in names:
        if not 0 <= train_seconds[name] < math.inf:
            raise ValueError(f"train_seconds of {name} must be finite, got {train_seconds[name]}")
    return RoundTime(
        down={name: links[name].seconds_down(bytes_down[name]) for name in names},
        train={name: float(train_seconds[name]) for name in names},
        up={name: links[name].seconds_up(bytes_up[name]) for name in names},
    )
