"""Codecs that shorten what clients send and leave sums sums, also under encryption.

A new codec is one module and one line in `CODECS`; `README.md` has the table of them.
"""

from fedjax_llm.compression import feedback as feedback
from fedjax_llm.compression.chain import Chain as Chain
from fedjax_llm.compression.codec import Codec as Codec
from fedjax_llm.compression.codec import Facts as Facts
from fedjax_llm.compression.codec import count as count
from fedjax_llm.compression.fragment import Fragment as Fragment
from fedjax_llm.compression.identity import Identity as Identity
from fedjax_llm.compression.masks import RandomMask as RandomMask
from fedjax_llm.compression.masks import TopMask as TopMask
from fedjax_llm.compression.masks import TurnMask as TurnMask
from fedjax_llm.compression.packing import pack as pack
from fedjax_llm.compression.packing import payload_bytes as payload_bytes
from fedjax_llm.compression.packing import unpack as unpack
from fedjax_llm.compression.power_sgd import PowerSgd as PowerSgd
from fedjax_llm.compression.rotation import Rotated as Rotated
from fedjax_llm.compression.rounding import dequantise as dequantise
from fedjax_llm.compression.rounding import largest_integer as largest_integer
from fedjax_llm.compression.rounding import least_error_cut as least_error_cut
from fedjax_llm.compression.rounding import longest as longest
from fedjax_llm.compression.rounding import norm_before_rounding as norm_before_rounding
from fedjax_llm.compression.rounding import quantise as quantise
from fedjax_llm.compression.rounding import quantise_within as quantise_within
from fedjax_llm.compression.rounding import step_for as step_for
from fedjax_llm.compression.sketch import Sketch as Sketch

_CODECS: tuple[type[Codec], ...] = (
    Identity,
    Rotated,
    RandomMask,
    TurnMask,
    TopMask,
    Sketch,
    PowerSgd,
    Fragment,
)
CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in _CODECS}

__all__ = [
    "CODECS",
    "Chain",
    "Codec",
    "Facts",
    "Fragment",
    "Identity",
    "PowerSgd",
    "RandomMask",
    "Rotated",
    "Sketch",
    "TopMask",
    "TurnMask",
    "count",
    "dequantise",
    "feedback",
    "largest_integer",
    "least_error_cut",
    "longest",
    "norm_before_rounding",
    "pack",
    "payload_bytes",
    "quantise",
    "quantise_within",
    "step_for",
    "unpack",
]
