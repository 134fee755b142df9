"""Factor averaging: the clients' A and B are averaged one by one."""

from fedjax_llm.aggregation.rule import AggregationRule, Facts


class FactorAveraging(AggregationRule):
    """FedIT's rule (arXiv 2305.05644), also that of DP-LoRA (2312.17493, algorithm 1).

    It is not exact: a mean of A times a mean of B is not the mean of the products, and noise on
    both factors multiplies. It is here because the papers use it.
    """

    name = "factor-averaging"
    source = "arXiv 2305.05644; 2312.17493, algorithm 1"
    summary = "A and B are averaged one by one (FedIT, DP-LoRA)"
    facts = Facts(exact=False, dp_safe=False, ranks=True, uplink="R (D + F)", downlink="R (D + F)")
    phases = (("a", "b"),)
