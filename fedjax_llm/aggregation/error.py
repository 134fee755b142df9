"""How far a rule's result is from the mean of the clients' products."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.aggregation.part import Part
from fedjax_llm.aggregation.rule import AggregationRule, ServerState
from fedjax_llm.aggregation.stacked import Stack, stacks
from fedjax_llm.lora import Adapter, algebra


def with_plain_step(rule: AggregationRule) -> AggregationRule:
    """The rule as it aggregates, before its server optimiser makes something else of it."""
    return dataclasses.replace(rule, optimizer=optax.sgd(1.0))


def mean_product(
    rule: AggregationRule, server: ServerState, after_K: Part, shares_K: jax.Array
) -> dict[str, Stack]:
    """The weighted mean of the clients' products by projection, in factors of inner size K R.

    Args:
        rule: says which adapter the model runs with.
        server: that was broadcast.
        after_K: what the clients came to, leaves [K, ...].
        shares_K: weights that add up to one; clients of share 0 play no part.
    """

    def of_client(after: Part, share: jax.Array) -> Part:
        adapter = rule.adapter(server, after)
        # What took no part may not be finite, and zero times that is not zero.
        return {
            name: {
                "a": jnp.where(share > 0, factor.a_LxDxR, jnp.float32(0)),
                "b": jnp.where(share > 0, factor.b_LxRxF, jnp.float32(0)),
            }
            for name, factor in adapter.factors.items()
        }

    return dict(stacks(jax.vmap(of_client)(after_K, shares_K), shares_K))


def aggregation_error(mean: dict[str, Stack], before: ServerState, after: ServerState) -> jax.Array:
    """The Frobenius distance of the new global product from the mean one, over the latter's norm.

    What a rule folded into the base counts as part of its product. Over all layers and projections
    together; 0 when both are zero.

    Args:
        mean: from `mean_product`.
        before: the server's state that was broadcast.
        after: the state that the rule made of the round, with a plain server step.
    """
    apart, size = [], []
    for name, stack in mean.items():
        new = after.adapter.factors[name]
        size.append(algebra.frobenius_of_sum([stack]))
        if not after.residual:
            apart.append(algebra.frobenius_of_sum([stack, (-new.a_LxDxR, new.b_LxRxF)]))
            continue
        folded_LxDxF = after.residual[name] - before.residual[name]
        missing_LxDxF = folded_LxDxF / jnp.float32(after.adapter.scale)
        missing_LxDxF += algebra.matmul(new.a_LxDxR, new.b_LxRxF)
        missing_LxDxF -= algebra.matmul(stack.a_LxDxN, stack.b_LxNxF)
        apart.append(jnp.sqrt(jnp.sum(jnp.square(missing_LxDxF))))
    distance, length = (jnp.sqrt(jnp.sum(jnp.square(jnp.stack(x)))) for x in (apart, size))
    return jnp.where(distance > 0, distance / length, jnp.float32(0))


def product(adapter: Adapter) -> dict[str, Stack]:
    """An adapter's own product as stacks."""
    return {name: Stack(*factor) for name, factor in adapter.factors.items()}
