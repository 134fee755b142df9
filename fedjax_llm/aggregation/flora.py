"""FLoRA: the clients' adapters are stacked, which is exact, and folded into the base."""

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, pick, size_at_rank
from fedjax_llm.aggregation.rule import AggregationRule, Facts, Round, ServerState
from fedjax_llm.aggregation.stacked import results, stacks
from fedjax_llm.lora import Adapter, LowRank, algebra


class Flora(AggregationRule):
    """FLoRA's rule (arXiv 2409.05976, section 3).

    Stacked side by side, the clients' factors multiply to the weighted mean of their products,
    whatever their ranks. The stack goes to all clients, who fold it into the base weights and start
    the next round with a fresh adapter. So the base changes, which is why the result is exported
    as a merged model, and the download grows with the number of clients.
    """

    name = "flora"
    source = "arXiv 2409.05976"
    summary = "adapters are stacked and folded into the base, a fresh one starts each round"
    facts = Facts(
        exact=True, dp_safe=False, ranks=True, uplink="R_k (D + F)", downlink="sum of R_k, (D + F)"
    )
    phases = (("a", "b"),)
    needs_individual_messages = True
    plain_steps_only = True
    new_coordinates = True
    truncates = True

    def init(self, adapter: Adapter) -> ServerState:
        """With an empty change of the base."""
        return super().init(adapter)._replace(residual=empty_residual(adapter))

    def apply_each(
        self, round_: Round, messages_K: Part, shares_K: jax.Array, ranks_K: jax.Array
    ) -> ServerState:
        """Folds the mean product into the base and draws the next adapter."""
        rate, server = self._rate(round_)
        found = stacks(results(self, round_, messages_K, ranks_K), shares_K)
        scale = jnp.float32(server.adapter.scale) * rate
        residual, factors = {}, {}
        for index, (name, (a_LxDxR, b_LxRxF)) in enumerate(server.adapter.factors.items()):
            product_LxDxF = algebra.matmul(found[name].a_LxDxN, found[name].b_LxNxF)
            residual[name] = server.residual[name] + scale * product_LxDxF
            bound = a_LxDxR.shape[1] ** -0.5  # as `lora.init_adapter`
            fresh_LxDxR = jax.random.uniform(
                jax.random.fold_in(round_.key, index),
                a_LxDxR.shape,
                jnp.float32,
                minval=-bound,
                maxval=bound,
            )
            factors[name] = LowRank(fresh_LxDxR, jnp.zeros_like(b_LxRxF))
        adapter = Adapter(factors=factors, scale=server.adapter.scale)
        return server._replace(adapter=adapter, residual=residual)

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """Everybody's factors; the fresh ones follow from the round's public randomness."""
        del phase, rank
        whole = pick(server.adapter, ("a", "b"))
        return sum(size_at_rank(whole, each) for each in ranks)


def empty_residual(adapter: Adapter) -> dict[str, jax.Array]:
    """Zeros for each adapted projection, float32 [L, D, F]."""
    return {
        name: jnp.zeros((a_LxDxR.shape[0], a_LxDxR.shape[1], b_LxRxF.shape[2]), jnp.float32)
        for name, (a_LxDxR, b_LxRxF) in adapter.factors.items()
    }
