"""FedSA-LoRA: A is shared, each client keeps a B of its own."""

from fedjax_llm.aggregation.rule import AggregationRule, Facts


class FedSaLora(AggregationRule):
    """FedSA-LoRA's rule (arXiv 2410.01463, section 4).

    Both factors are trained; A, which learns what clients have in common, is averaged, and B, which
    learns what is theirs, never leaves. There is no global product, hence nothing to be exact
    about: every client is evaluated with its own adapter.
    """

    name = "fedsa"
    source = "arXiv 2410.01463"
    summary = "A is averaged, each client keeps its own B (personal adapters)"
    facts = Facts(exact=False, dp_safe=False, ranks=True, uplink="R D", downlink="R D")
    phases = (("a", "b"),)
    kept = ("b",)
