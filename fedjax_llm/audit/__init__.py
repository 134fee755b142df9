"""Audits: what a run really betrays, to hold against what its accountant promises."""

from .canaries import Canaries as Canaries
from .canaries import CanaryRow as CanaryRow
from .canaries import plant as plant
from .canaries import toss as toss
from .canaries import with_canaries as with_canaries
from .clients import audit_clients as audit_clients
from .examples import audit_examples as audit_examples
from .one_run import AuditReport as AuditReport
from .one_run import Bound as Bound
from .one_run import audit as audit
from .one_run import lower_bound as lower_bound
from .scores import Scorer as Scorer
from .scores import observed as observed

__all__ = [
    "AuditReport",
    "Bound",
    "Canaries",
    "CanaryRow",
    "Scorer",
    "audit",
    "audit_clients",
    "audit_examples",
    "lower_bound",
    "observed",
    "plant",
    "toss",
    "with_canaries",
]
