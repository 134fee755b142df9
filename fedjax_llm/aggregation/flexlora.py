"""FlexLoRA: the mean product is cut at rank R, and each client takes as much as it can hold."""

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, pick, size_at_rank
from fedjax_llm.aggregation.rule import AggregationRule, Facts, Round, ServerState
from fedjax_llm.aggregation.stacked import results, stacks
from fedjax_llm.lora import Adapter, LowRank, algebra


class FlexLora(AggregationRule):
    """FlexLoRA's rule (arXiv 2402.11505, section 4).

    The server forms the weighted mean of the clients' products and its best approximation of rank
    R; a client of rank R_k works with the leading R_k directions. The paper decomposes the D x F
    matrix; here two QR factorisations of the stacked factors and a small SVD do the same. Exact up
    to what the mean has beyond rank R. All clients share the scale alpha / R of the run.
    """

    name = "flexlora"
    source = "arXiv 2402.11505"
    summary = "the mean product is cut at rank R; clients take its leading directions"
    facts = Facts(
        exact=False, dp_safe=False, ranks=True, uplink="R_k (D + F)", downlink="R_k (D + F)"
    )
    phases = (("a", "b"),)
    needs_individual_messages = True
    plain_steps_only = True
    new_coordinates = True
    truncates = True

    def apply_each(
        self, round_: Round, messages_K: Part, shares_K: jax.Array, ranks_K: jax.Array
    ) -> ServerState:
        """The best rank-R form of the weighted mean product."""
        rate, server = self._rate(round_)
        found = stacks(results(self, round_, messages_K, ranks_K), shares_K * rate)
        factors = {}
        for name, (a_LxDxR, b_LxRxF) in server.adapter.factors.items():
            stack = found[name]
            # A rate below one leaves the rest of the old product in the mean.
            a_LxDxN = jnp.concatenate([a_LxDxR * (1 - rate), stack.a_LxDxN], axis=-1)
            b_LxNxF = jnp.concatenate([b_LxRxF, stack.b_LxNxF], axis=-2)
            factors[name] = LowRank(*algebra.truncated(a_LxDxN, b_LxNxF, a_LxDxR.shape[-1]))
        return server._replace(adapter=Adapter(factors=factors, scale=server.adapter.scale))

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """The leading directions."""
        del phase, ranks
        return size_at_rank(pick(server.adapter, ("a", "b")), rank)
