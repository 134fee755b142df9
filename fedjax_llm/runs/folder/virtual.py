"""What a run took in virtual time: money, goodput and bytes, for summary.json and the report.

The bytes here are those of the simulation, with what failed or came late; those of the rounds are
counted where they cross between clouds and are in `uplink_bytes` and `downlink_bytes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from fedjax_llm.federation.calendar import Calendar


@dataclass(frozen=True)
class Paid:
    """What a cloud, or the server, pays for a run.

    Attributes:
      rent: dollars for machines.
      egress: dollars for bytes that leave.
      lost: dollars of these two that went into cycles that came to nothing.
      bytes_out: that leave, without what loss makes the link send again.
      bytes_in: that come in.
    """

    rent: float
    egress: float
    lost: float
    bytes_out: int
    bytes_in: int

    @property
    def dollars(self) -> float:
        """Rent and egress."""
        return self.rent + self.egress


@dataclass(frozen=True)
class Virtual:
    """A run in virtual time.

    Attributes:
      dollars: of clouds and server.
      goodput: training whose result entered the model, over clouds x duration.
      goodput_up: the same over the time for which the clouds were up.
      clouds: what each pays.
      server: what the server pays.
    """

    dollars: float
    goodput: float
    goodput_up: float
    clouds: Mapping[str, Paid]
    server: Paid

    @property
    def payers(self) -> dict[str, Paid]:
        """Clouds and server, by name."""
        return {**self.clouds, "server": self.server}

    @property
    def lost(self) -> float:
        """Dollars of all clouds that came to nothing."""
        return sum(cloud.lost for cloud in self.clouds.values())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Of what `dataclasses.asdict` made of it."""
        clouds = {name: Paid(**own) for name, own in content["clouds"].items()}
        return cls(**{**content, "clouds": clouds, "server": Paid(**content["server"])})


def of(calendar: "Calendar", rounds: int) -> Virtual:
    """What so many rounds took; what was under way at their end is in it as far as it had come."""
    from fedjax_llm.clouds.intervals import goodput
    from fedjax_llm.clouds.money import bill

    timeline = calendar.timeline.until(rounds)
    found = bill(timeline, calendar.clouds)
    share = goodput(timeline, [cloud.presence for cloud in calendar.clouds])
    columns = (
        found.rent_NxC.sum(axis=0),
        found.egress_NxC.sum(axis=0),
        found.lost_C,
        found.up_NxC.sum(axis=0),
        found.down_NxC.sum(axis=0),
    )
    clouds = {
        name: Paid(rent, egress, lost, round(out), round(into))
        for name, rent, egress, lost, out, into in zip(
            timeline.names, *(column.tolist() for column in columns), strict=True
        )
    }
    server = Paid(
        float(found.server_rent_N.sum()),
        float(found.server_egress_NxC.sum()),
        0.0,
        sum(cloud.bytes_in for cloud in clouds.values()),
        sum(cloud.bytes_out for cloud in clouds.values()),
    )
    return Virtual(found.dollars, share.of_run, share.while_up, clouds, server)
