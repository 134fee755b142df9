"""FedEx-LoRA: factors are averaged, and the base takes what their product misses."""

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.flora import empty_residual
from fedjax_llm.aggregation.part import Part, pick, put, size_at_rank, zip_with
from fedjax_llm.aggregation.rule import AggregationRule, Facts, Round, ServerState
from fedjax_llm.aggregation.stacked import results, stacks
from fedjax_llm.lora import Adapter, algebra


class FedExLora(AggregationRule):
    """FedEx-LoRA's rule (arXiv 2410.09432, section 4).

    A and B are averaged one by one; the mean of the products minus the product of the means, of
    rank K R at most, is added to the frozen base weights, so that the model of the next round is
    exact. The base changes: the result is exported as a merged model.
    """

    name = "fedex"
    source = "arXiv 2410.09432"
    summary = "A and B are averaged, what their product misses goes into the base"
    facts = Facts(
        exact=True, dp_safe=False, ranks=True, uplink="R (D + F)", downlink="(K + 1) R (D + F)"
    )
    phases = (("a", "b"),)
    needs_individual_messages = True
    plain_steps_only = True

    def init(self, adapter: Adapter) -> ServerState:
        """With an empty change of the base."""
        return super().init(adapter)._replace(residual=empty_residual(adapter))

    def apply_each(
        self, round_: Round, messages_K: Part, shares_K: jax.Array, ranks_K: jax.Array
    ) -> ServerState:
        """Averages the factors and folds the rest of the mean product into the base."""
        rate, server = self._rate(round_)
        before = self.trainable(server)
        found = stacks(results(self, round_, messages_K, ranks_K), shares_K * rate)
        mean = jax.tree.map(
            lambda leaf_K: jnp.tensordot(shares_K, leaf_K, axes=1) * rate, messages_K
        )
        after = put(server.adapter, zip_with(jnp.add, before, mean))
        scale = jnp.float32(server.adapter.scale)
        residual = {}
        for name, old in server.adapter.factors.items():
            new, stack = after.factors[name], found[name]
            # rate * mean + (1 - rate) * old - new, as one product.
            product_LxDxF = algebra.matmul(
                jnp.concatenate([stack.a_LxDxN, old.a_LxDxR * (1 - rate), -new.a_LxDxR], axis=-1),
                jnp.concatenate([stack.b_LxNxF, old.b_LxRxF, new.b_LxRxF], axis=-2),
            )
            residual[name] = server.residual[name] + scale * product_LxDxF
        return server._replace(adapter=after, residual=residual)

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """The mean factors, and the rest in factors of the clients' ranks together."""
        del phase, rank
        whole = pick(server.adapter, ("a", "b"))
        return size_at_rank(whole) + sum(size_at_rank(whole, each) for each in ranks)
