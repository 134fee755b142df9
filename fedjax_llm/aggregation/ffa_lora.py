"""FFA-LoRA: A stays as drawn, only B is trained and sent."""

from fedjax_llm.aggregation.rule import AggregationRule, Facts


class FfaLora(AggregationRule):
    """FFA-LoRA's rule (arXiv 2403.12313, section 4).

    With A fixed the product is linear in what is sent, so the mean of the messages is the mean
    of the products: the rule is exact, adds under encryption, and noise enters once.
    """

    name = "ffa"
    source = "arXiv 2403.12313"
    summary = "A stays as drawn, B is trained and averaged"
    facts = Facts(exact=True, dp_safe=True, ranks=True, uplink="R F", downlink="R F")
    phases = (("b",),)
