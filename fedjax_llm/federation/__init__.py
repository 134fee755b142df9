"""The federation: clouds around one frozen base model, trained as one batched program."""

from fedjax_llm.federation.compressor import Compression as Compression
from fedjax_llm.federation.federation import Federation as Federation
from fedjax_llm.federation.keys import Purpose as Purpose
from fedjax_llm.federation.keys import key_for as key_for
from fedjax_llm.federation.layout import CohortLayout as CohortLayout
from fedjax_llm.federation.promises import Combination as Combination
from fedjax_llm.federation.recipe import Attackers as Attackers
from fedjax_llm.federation.reports import CloudReport as CloudReport
from fedjax_llm.federation.reports import RoundReport as RoundReport
from fedjax_llm.federation.roads import ToOpen as ToOpen
from fedjax_llm.federation.state import FederationState as FederationState
from fedjax_llm.federation.state import adapter_of as adapter_of
from fedjax_llm.federation.state import init_state as init_state
from fedjax_llm.federation.sums import Bfv as Bfv
from fedjax_llm.federation.sums import Ckks as Ckks
from fedjax_llm.federation.sums import Masked as Masked
from fedjax_llm.federation.sums import Plain as Plain
from fedjax_llm.federation.sums import Selective as Selective
from fedjax_llm.federation.sums import SumMode as SumMode
from fedjax_llm.federation.sums import Threshold as Threshold
from fedjax_llm.federation.tables import Participant as Participant

__all__ = [
    "Attackers",
    "Bfv",
    "Ckks",
    "CloudReport",
    "CohortLayout",
    "Combination",
    "Compression",
    "Federation",
    "FederationState",
    "Masked",
    "Participant",
    "Plain",
    "Purpose",
    "RoundReport",
    "Selective",
    "SumMode",
    "Threshold",
    "ToOpen",
    "adapter_of",
    "init_state",
    "key_for",
]
