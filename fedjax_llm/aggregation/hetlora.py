"""HetLoRA: clients of smaller rank are padded with zeros, and long products weigh more."""

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, subset, zip_with
from fedjax_llm.aggregation.rule import AggregationRule, Facts, LocalResult, PyTree, Round
from fedjax_llm.lora import algebra


class HetLora(AggregationRule):
    """HetLoRA's rule (arXiv 2401.06432, sections 3.1 and 3.3).

    A client of rank R_k works with the first R_k columns of A and rows of B. The server averages
    the zero-padded factors with weights in proportion to the Frobenius norm of each client's
    product over all layers ("sparsity-weighted"). Weights and weighted factors add up, so that the
    rule works under encryption, in one more, short sum. The paper's pruning of a client's rank
    during the run (section 3.2) is not part of the rule: ranks are those of the run file.
    """

    name = "hetlora"
    source = "arXiv 2401.06432"
    summary = "zero-padded A and B, averaged by the norm of each client's product"
    facts = Facts(
        exact=False, dp_safe=False, ranks=True, uplink="R_k (D + F)", downlink="R_k (D + F)"
    )
    phases = (("a", "b"),)
    truncates = True
    weighs_by_result = True

    def message(self, round_: Round, result: LocalResult, stage: int, shared: PyTree) -> Part:
        """The padded factors minus the global ones."""
        del stage, shared
        whole = self.trainable(round_.server, round_.phase)
        return subset(zip_with(jnp.subtract, result.after, whole), self.sent(round_.phase))

    def weight(self, round_: Round, result: LocalResult) -> jax.Array:
        """The Frobenius norm of the client's product, without the scale."""
        adapter = self.adapter(round_.server, result.after)
        squares = [
            jnp.square(algebra.frobenius_of_sum([(factor.a_LxDxR, factor.b_LxRxF)]))
            for factor in adapter.factors.values()
        ]
        return jnp.sqrt(jnp.sum(jnp.stack(squares)))
