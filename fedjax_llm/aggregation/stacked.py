"""What the rules share that read every client's factors: the results, put side by side."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, where_rank, zip_with
from fedjax_llm.aggregation.rule import AggregationRule, Round
from fedjax_llm.lora import algebra


class Stack(NamedTuple):
    """The clients' factors of one projection side by side: their product is the weighted mean."""

    a_LxDxN: jax.Array
    b_LxNxF: jax.Array


def results(rule: AggregationRule, round_: Round, messages_K: Part, ranks_K: jax.Array) -> Part:
    """What each client came to, leaves [K, ...]: its start, which is known, plus its change.

    Args:
        rule: says where a client of a rank starts.
        round_: what everybody knows.
        messages_K: the clients' changes.
        ranks_K: int32 [K].
    """

    def one(message: Part, rank: jax.Array) -> Part:
        start = rule.start(round_, rank)
        after = zip_with(jnp.add, start, message)
        # Fixed point rounds zeros to zeros; this keeps it so whatever the codec.
        return where_rank(after, start, rank)

    return jax.vmap(one)(messages_K, ranks_K)


def stacks(results_K: Part, shares_K: jax.Array) -> Mapping[str, Stack]:
    """The weighted mean of the products by projection, as factors of inner size K * R."""
    return {
        name: Stack(
            algebra.side_by_side(sides["a"], shares_K), algebra.one_above_another(sides["b"])
        )
        for name, sides in results_K.items()
    }
