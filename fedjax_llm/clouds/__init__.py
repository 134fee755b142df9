"""Clouds: the sites where clients run, their links, and the virtual time of a round over them."""

from .link import Cloud as Cloud
from .link import Link as Link
from .link import RoundTime as RoundTime
from .link import check_unique as check_unique
from .link import round_seconds as round_seconds

__all__ = ["Cloud", "Link", "RoundTime", "check_unique", "round_seconds"]
