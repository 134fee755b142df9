"""RoLoRA: the rounds train B and A in turn, so that both learn and every mean is exact."""

from fedjax_llm.aggregation.rule import AggregationRule, Facts


class RoLora(AggregationRule):
    """RoLoRA's rule (arXiv 2502.01755, algorithm 1).

    Odd rounds train and average B with A frozen, even ones A with B frozen; B comes first, because
    A has no gradient while B is zero. In each round the product is linear in what is sent. The
    paper makes the clients' optimisers anew each round; here each factor keeps its own state from
    one of its rounds to the next, at the client and at the server.
    """

    name = "rolora"
    source = "arXiv 2502.01755"
    summary = "rounds train and average B and A in turn"
    facts = Facts(
        exact=True,
        dp_safe=True,
        ranks=True,
        uplink="R F, R D in turn",
        downlink="R F, R D in turn",
    )
    phases = (("b",), ("a",))
