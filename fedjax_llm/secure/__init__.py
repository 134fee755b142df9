"""Sums that reveal nothing but the sum: fixed point, a plain reference, and threshold BFV.

OpenFHE is imported (and mended where the system is older than its wheel) only when an encrypted
sum is set up. The README in this folder has the protocol, its costs and its threat model.
"""

from fedjax_llm.secure.fixed_point import FixedPoint as FixedPoint
from fedjax_llm.secure.plain import PlainSum as PlainSum
from fedjax_llm.secure.sums import BadMessage as BadMessage
from fedjax_llm.secure.sums import BelowThreshold as BelowThreshold
from fedjax_llm.secure.sums import SecureSum as SecureSum
from fedjax_llm.secure.sums import SumResult as SumResult
from fedjax_llm.secure.sums import WrongSum as WrongSum
from fedjax_llm.secure.threshold import ThresholdSum as ThresholdSum

__all__ = [
    "BadMessage",
    "BelowThreshold",
    "FixedPoint",
    "PlainSum",
    "SecureSum",
    "SumResult",
    "ThresholdSum",
    "WrongSum",
]
