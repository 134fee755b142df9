"""A cloud's network link, and the virtual time of a synchronous round over such links."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedjax_llm.errors import UserError

_NAME = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class Link:
    """The wide-area link between a cloud and the server.

    Attributes:
        up_mbps: bandwidth from the cloud, in megabits (10^6 bits) per second.
        down_mbps: bandwidth to the cloud, in megabits per second.
        latency_ms: one-way latency in milliseconds, paid once per transfer.

    Raises:
        UserError: a bandwidth is not positive and finite, or the latency not finite or negative.
    """

    up_mbps: float
    down_mbps: float
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up_mbps", "down_mbps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.latency_ms < math.inf:
            raise UserError(f"latency_ms must be zero or more and finite, got {self.latency_ms}")

    def seconds_up(self, size: int) -> float:
        """Seconds to send `size` bytes from the cloud to the server.

        >>> Link(up_mbps=8.0, down_mbps=80.0, latency_ms=500.0).seconds_up(1_000_000)
        1.5
        """
        return _seconds(size, self.up_mbps, self.latency_ms)

    def seconds_down(self, size: int) -> float:
        """Seconds to send `size` bytes from the server to the cloud."""
        return _seconds(size, self.down_mbps, self.latency_ms)


def _seconds(size: int, mbps: float, latency_ms: float) -> float:
    if size < 0:
        raise ValueError(f"bytes must be zero or more, got {size}")
    return latency_ms / 1e3 + size * 8 / (mbps * 1e6)


@dataclass(frozen=True)
class Cloud:
    """A site where clients run.

    Attributes:
        name: lower-case letters, digits, `_` and `-`; it names files and log entries.
        link: its link to the server.

    Raises:
        UserError: the name is empty or has other characters.
    """

    name: str
    link: Link

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"cloud name must be made of a-z, 0-9, '_' and '-', got {self.name!r}; rename it"
            )


def check_unique(clouds: tuple[Cloud, ...]) -> None:
    """Raises UserError when there is no cloud or two clouds share a name."""
    if not clouds:
        raise UserError("a run needs at least one cloud; name one in the run file")
    seen: set[str] = set()
    for cloud in clouds:
        if cloud.name in seen:
            raise UserError(f"cloud name {cloud.name!r} is used twice; give each cloud its own")
        seen.add(cloud.name)


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
