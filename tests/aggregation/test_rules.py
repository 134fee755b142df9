"""What every aggregation rule promises, against a dense float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, AggregationRule
from fedjax_llm.lora import Adapter
from fedjax_llm.lora.adapter import LowRank

LAYERS, INPUTS, OUTPUTS, RANK = 2, 12, 10, 3


def adapter(seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    a = jnp.asarray(draw.normal(size=(LAYERS, INPUTS, RANK)), jnp.float32)
    b = jnp.asarray(draw.normal(size=(LAYERS, RANK, OUTPUTS)), jnp.float32)
    return Adapter({"q_proj": LowRank(a, b)}, 2.0)


def trained(rule: AggregationRule, start: Adapter, seed: int) -> Adapter:
    """What a client might come to: its trainable part moved at random."""
    part = rule.trainable(start)
    leaves, structure = jax.tree.flatten(part)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return rule.replace(start, jax.tree.unflatten(structure, moved))


def aggregate(rule: AggregationRule, start: Adapter, clients: list[Adapter]) -> Adapter:
    state = rule.init(start)
    before = rule.trainable(start)
    messages = [rule.message(before, rule.trainable(client)) for client in clients]
    mean = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *messages)
    return rule.apply(mean, state).adapter


def dense(one: Adapter) -> np.ndarray:
    a, b = (np.asarray(factor, np.float64) for factor in one.factors["q_proj"])
    return one.scale * a @ b


@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> AggregationRule:
    return RULES[request.param](optax.sgd(1.0))


def test_the_name_is_the_key(rule: AggregationRule) -> None:
    assert rule.name in RULES


def test_clients_that_did_nothing_change_nothing(rule: AggregationRule) -> None:
    start = adapter(0)
    after = aggregate(rule, start, [start, start, start])
    jax.tree.map(np.testing.assert_array_equal, after, start)


def test_one_client_gives_its_own_result(rule: AggregationRule) -> None:
    start = adapter(0)
    client = trained(rule, start, 1)
    np.testing.assert_allclose(dense(aggregate(rule, start, [client])), dense(client), atol=1e-5)


def test_the_order_of_clients_does_not_matter(rule: AggregationRule) -> None:
    start = adapter(0)
    clients = [trained(rule, start, seed) for seed in range(4)]
    one, other = (aggregate(rule, start, order) for order in (clients, clients[::-1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_exact_rules_apply_the_mean_of_the_products(rule: AggregationRule) -> None:
    """And a rule that does not say it is exact is not: the flag is worth reading."""
    start = adapter(0)
    clients = [trained(rule, start, seed) for seed in range(5)]
    truth = np.mean([dense(client) for client in clients], axis=0)
    error = np.linalg.norm(dense(aggregate(rule, start, clients)) - truth) / np.linalg.norm(truth)
    assert error < 1e-5 if rule.exact else error > 1e-4


def test_server_optimisers_see_the_negated_mean_as_gradient(rule: AggregationRule) -> None:
    start = adapter(0)
    clients = [trained(rule, start, seed) for seed in range(3)]
    half = RULES[rule.name](optax.sgd(0.5))
    full_step = jax.tree.map(jnp.subtract, aggregate(rule, start, clients), start)
    half_step = jax.tree.map(jnp.subtract, aggregate(half, start, clients), start)
    jax.tree.map(lambda f, h: np.testing.assert_allclose(f, 2 * h, atol=1e-5), full_step, half_step)
