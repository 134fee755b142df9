"""Clouds: the sites where clients run, their links, and the virtual time of a round over them."""

from .availability import Always as Always
from .availability import Availability as Availability
from .availability import Failures as Failures
from .availability import Trace as Trace
from .availability import trace_from_csv as trace_from_csv
from .catalogue import Catalogue as Catalogue
from .catalogue_file import load as load_catalogue
from .cloud import Cloud as Cloud
from .cloud import check_unique as check_unique
from .compute import Compute as Compute
from .compute import training_flops as training_flops
from .link import Link as Link
from .link import Path as Path
from .link import RoundTime as RoundTime
from .link import round_seconds as round_seconds
from .prices import DESTINATIONS as DESTINATIONS
from .prices import Egress as Egress
from .prices import Prices as Prices
from .rates import Rate as Rate
from .rates import rate_from_csv as rate_from_csv

__all__ = [
    "DESTINATIONS",
    "Always",
    "Availability",
    "Catalogue",
    "Cloud",
    "Compute",
    "Egress",
    "Failures",
    "Link",
    "Path",
    "Prices",
    "Rate",
    "RoundTime",
    "Trace",
    "check_unique",
    "load_catalogue",
    "rate_from_csv",
    "round_seconds",
    "trace_from_csv",
    "training_flops",
]
