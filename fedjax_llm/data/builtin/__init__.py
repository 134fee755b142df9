"""Corpora that travel with the package: three clouds with three deliberately different schemas."""

from .corpora import BUILTIN_NAMES as BUILTIN_NAMES
from .corpora import builtin_capacity as builtin_capacity
from .corpora import builtin_mapping as builtin_mapping
from .corpora import builtin_rows as builtin_rows

__all__ = ["BUILTIN_NAMES", "builtin_capacity", "builtin_mapping", "builtin_rows"]
