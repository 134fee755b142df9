"""Sums that reveal nothing but the sum, in five modes behind one interface.

OpenFHE is imported (and mended where the system is older than its wheel) only when a sum that uses
it is set up. The README in this folder has the protocols, their costs and the threat model.
"""

from fedjax_llm.secure.fixed_point import FixedPoint as FixedPoint
from fedjax_llm.secure.library_sum import BfvSum as BfvSum
from fedjax_llm.secure.library_sum import CkksSum as CkksSum
from fedjax_llm.secure.masked import MaskedSum as MaskedSum
from fedjax_llm.secure.plain import PlainSum as PlainSum
from fedjax_llm.secure.sums import BadMessage as BadMessage
from fedjax_llm.secure.sums import BelowThreshold as BelowThreshold
from fedjax_llm.secure.sums import NoAnswer as NoAnswer
from fedjax_llm.secure.sums import RoundSum as RoundSum
from fedjax_llm.secure.sums import SecureSum as SecureSum
from fedjax_llm.secure.sums import SumResult as SumResult
from fedjax_llm.secure.sums import WrongSum as WrongSum
from fedjax_llm.secure.sums import collect as collect
from fedjax_llm.secure.sums import sum_uploads as sum_uploads
from fedjax_llm.secure.threshold import ThresholdSum as ThresholdSum

__all__ = [
    "BadMessage",
    "BelowThreshold",
    "BfvSum",
    "CkksSum",
    "FixedPoint",
    "MaskedSum",
    "NoAnswer",
    "PlainSum",
    "RoundSum",
    "SecureSum",
    "SumResult",
    "ThresholdSum",
    "WrongSum",
    "collect",
    "sum_uploads",
]
