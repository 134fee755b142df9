"""FFA-LoRA: A stays as drawn, only B is trained and sent."""

from typing import Any

import optax

from fedjax_llm.aggregation.rule import AggregationRule
from fedjax_llm.lora import Adapter


def ffa_lora(optimizer: optax.GradientTransformation) -> AggregationRule:
    """Returns FFA-LoRA's rule (arXiv 2403.12313, section 4).

    With A fixed the product is linear in what is sent, so the mean of the messages is the mean
    of the products: the rule is exact, adds under encryption, and noise enters once.
    """

    def trainable(adapter: Adapter) -> Any:
        return {name: factor.b_LxRxF for name, factor in adapter.factors.items()}

    def replace(adapter: Adapter, b_factors: Any) -> Adapter:
        factors = {
            name: factor._replace(b_LxRxF=b_factors[name])
            for name, factor in adapter.factors.items()
        }
        return Adapter(factors=factors, scale=adapter.scale)

    return AggregationRule(
        name="ffa",
        source="arXiv 2403.12313",
        exact=True,
        needs_individual_messages=False,
        trainable=trainable,
        replace=replace,
        optimizer=optimizer,
    )
