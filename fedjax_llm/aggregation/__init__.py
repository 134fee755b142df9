"""Aggregation rules: how local results become the next global adapter.

A new rule is one module and one line in `RULES`; `README.md` shows how.
"""

from fedjax_llm.aggregation.error import aggregation_error as aggregation_error
from fedjax_llm.aggregation.error import mean_product as mean_product
from fedjax_llm.aggregation.error import with_plain_step as with_plain_step
from fedjax_llm.aggregation.factor_averaging import FactorAveraging as FactorAveraging
from fedjax_llm.aggregation.fed_sb import FedSb as FedSb
from fedjax_llm.aggregation.fedask import FedAsk as FedAsk
from fedjax_llm.aggregation.fedask import FedAskFixedA as FedAskFixedA
from fedjax_llm.aggregation.fedex_lora import FedExLora as FedExLora
from fedjax_llm.aggregation.fedrot_lora import FedRotLora as FedRotLora
from fedjax_llm.aggregation.fedsa_lora import FedSaLora as FedSaLora
from fedjax_llm.aggregation.fedsvd import FedSvd as FedSvd
from fedjax_llm.aggregation.ffa_lora import FfaLora as FfaLora
from fedjax_llm.aggregation.flexlora import FlexLora as FlexLora
from fedjax_llm.aggregation.flora import Flora as Flora
from fedjax_llm.aggregation.hetlora import HetLora as HetLora
from fedjax_llm.aggregation.normalised import NormalisedMean as NormalisedMean
from fedjax_llm.aggregation.part import Part as Part
from fedjax_llm.aggregation.rolora import RoLora as RoLora
from fedjax_llm.aggregation.rule import AggregationRule as AggregationRule
from fedjax_llm.aggregation.rule import Facts as Facts
from fedjax_llm.aggregation.rule import LocalResult as LocalResult
from fedjax_llm.aggregation.rule import Round as Round
from fedjax_llm.aggregation.rule import ServerState as ServerState
from fedjax_llm.aggregation.server_optimizers import SERVER_OPTIMIZERS as SERVER_OPTIMIZERS
from fedjax_llm.aggregation.weights import LossWeights as LossWeights
from fedjax_llm.aggregation.weights import Weights as Weights
from fedjax_llm.aggregation.weights import step_norm as step_norm

_RULES: tuple[type[AggregationRule], ...] = (
    FfaLora,
    FactorAveraging,
    RoLora,
    FedSvd,
    FedAsk,
    FedAskFixedA,
    FedSb,
    FedRotLora,
    HetLora,
    FedSaLora,
    FedExLora,
    Flora,
    FlexLora,
)
RULES: dict[str, type[AggregationRule]] = {rule.name: rule for rule in _RULES}

__all__ = [
    "RULES",
    "SERVER_OPTIMIZERS",
    "AggregationRule",
    "FactorAveraging",
    "Facts",
    "FedAsk",
    "FedAskFixedA",
    "FedExLora",
    "FedRotLora",
    "FedSaLora",
    "FedSb",
    "FedSvd",
    "FfaLora",
    "FlexLora",
    "Flora",
    "HetLora",
    "LocalResult",
    "LossWeights",
    "NormalisedMean",
    "Part",
    "RoLora",
    "Round",
    "ServerState",
    "Weights",
    "aggregation_error",
    "mean_product",
    "step_norm",
    "with_plain_step",
]
