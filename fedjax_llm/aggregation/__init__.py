"""Aggregation rules: how local results become the next global adapter.

A new rule is one module and one line in `RULES`.
"""

from fedjax_llm.aggregation.factor_averaging import factor_averaging as factor_averaging
from fedjax_llm.aggregation.ffa_lora import ffa_lora as ffa_lora
from fedjax_llm.aggregation.rule import AggregationRule as AggregationRule
from fedjax_llm.aggregation.rule import ServerState as ServerState

RULES = {"ffa": ffa_lora, "factor-averaging": factor_averaging}

__all__ = ["RULES", "AggregationRule", "ServerState", "factor_averaging", "ffa_lora"]
