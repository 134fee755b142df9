"""A cloud: the site where clients run, with its link, its machines, its failures and its prices."""

import dataclasses
import re
from dataclasses import dataclass, field

from fedjax_llm.clouds.availability import Always, Availability, Failures
from fedjax_llm.clouds.compute import Compute
from fedjax_llm.clouds.link import Link
from fedjax_llm.clouds.prices import Prices
from fedjax_llm.errors import UserError

_NAME = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class Cloud:
    """A site where clients run.

    Attributes:
        name: lower-case letters, digits, `_` and `-`; it names files and log entries.
        link: its link to the server.
        compute: its machines; None: not told, and whoever simulates has to assume some.
        availability: when it can be reached.
        prices: what it costs.
        region: where it is, a name of the catalogue; a label here.
        instance: its machine type, the same.
        server: what the server pays: its machines, and egress with this cloud as destination.

    Raises:
        UserError: the name is empty or has other characters.
    """

    name: str
    link: Link
    compute: Compute | None = None
    availability: Availability = field(default_factory=Always)
    prices: Prices = field(default_factory=Prices)
    region: str | None = None
    instance: str | None = None
    server: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"cloud name must be made of a-z, 0-9, '_' and '-', got {self.name!r}; rename it"
            )

    def seeded(self, seed: int) -> "Cloud":
        """The same cloud, its jitter and failures drawn for this seed and this cloud's name."""
        availability = self.availability
        if isinstance(availability, Failures):
            availability = dataclasses.replace(availability, seed=seed, cloud=self.name)
        link = dataclasses.replace(self.link, seed=seed, cloud=self.name)
        return dataclasses.replace(self, link=link, availability=availability)

    @property
    def presence(self) -> Availability | None:
        """When it can be reached; None for a cloud that never fails, which asks no questions."""
        return None if isinstance(self.availability, Always) else self.availability

    def dollars(self, seconds: float, bytes_up: float, bytes_before: float = 0.0) -> float:
        """What the cloud pays for a span of time and its uploads in it; see `Prices.dollars`.

        Args:
            seconds: of rent.
            bytes_up: that arrived at the server; what the link sent again is added.
            bytes_before: that arrived in the same billing month before.
        """
        sent = self.link.sent_bytes
        return self.prices.dollars(seconds, sent(bytes_up), sent(bytes_before))


def check_unique(clouds: tuple[Cloud, ...]) -> None:
    """Raises UserError when there is no cloud or two clouds share a name."""
    if not clouds:
        raise UserError("a run needs at least one cloud; name one in the run file")
    seen: set[str] = set()
    for cloud in clouds:
        if cloud.name in seen:
            raise UserError(f"cloud name {cloud.name!r} is used twice; give each cloud its own")
        seen.add(cloud.name)
