"""Factor averaging: the clients' A and B are averaged one by one."""

from typing import Any

import optax

from fedjax_llm.aggregation.rule import AggregationRule
from fedjax_llm.lora import Adapter


def factor_averaging(optimizer: optax.GradientTransformation) -> AggregationRule:
    """Returns FedIT's rule (arXiv 2305.05644), also that of DP-LoRA (2312.17493, algorithm 1).

    It is not exact: a mean of A times a mean of B is not the mean of the products, and noise on
    both factors multiplies. It is here because the papers use it.
    """

    def trainable(adapter: Adapter) -> Any:
        return adapter.factors

    def replace(adapter: Adapter, factors: Any) -> Adapter:
        return Adapter(factors=factors, scale=adapter.scale)

    return AggregationRule(
        name="factor-averaging",
        source="arXiv 2305.05644; 2312.17493, algorithm 1",
        exact=False,
        needs_individual_messages=False,
        trainable=trainable,
        replace=replace,
        optimizer=optimizer,
    )
