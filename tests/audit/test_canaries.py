"""Canaries: orthogonal worst cases that training code takes for rows and the server for clients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.audit import Canaries, CanaryRow, Scorer, observed, plant, toss, with_canaries
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import poisson_clipped_grad_sum
from fedjax_llm.training import ClientTable

TREE = {"q_proj": {"a": jnp.zeros((2, 5, 3)), "b": jnp.ones((2, 3, 7))}}
SIZE = 72  # and 64 directions


def drawn(count: int = 64, scale: float = 3.0, seed: int = 0) -> Canaries:
    return Canaries.draw(jax.random.key(seed), TREE, count, scale)


def directions(canaries: Canaries) -> np.ndarray:
    numbers = jnp.arange(canaries.count, dtype=jnp.int32)
    return np.asarray(jax.vmap(canaries.direction)(numbers))


def test_directions_are_orthonormal_and_leave_few_coordinates_out() -> None:
    v_MxP = directions(drawn())
    assert v_MxP.shape == (64, SIZE)
    np.testing.assert_allclose(v_MxP @ v_MxP.T, np.eye(64), atol=1e-6)
    assert (np.abs(v_MxP).sum(0) > 0).sum() == 64


def test_the_fast_projection_is_the_inner_product_with_every_direction() -> None:
    canaries = drawn(37)
    released = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), TREE)
    expected = directions(canaries) @ np.asarray(ravel_pytree(released)[0])
    np.testing.assert_allclose(jax.jit(canaries.project)(released), expected, atol=1e-5)


def test_another_key_draws_other_directions() -> None:
    overlap = directions(drawn(seed=0)) @ directions(drawn(seed=1)).T
    assert np.abs(overlap).max() < 0.8


@pytest.mark.parametrize("count", [0, 65])
def test_more_canaries_than_directions_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"between 1 and 64.*72 parameters, got {count}"):
        drawn(count)


def row_loss(trainable: dict, row: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(trainable["q_proj"]["b"])) * jnp.sum(row)


def test_a_canarys_gradient_is_its_direction_and_a_real_rows_its_own() -> None:
    canaries = drawn()
    gradient = jax.grad(with_canaries(row_loss, canaries))
    planted = gradient(TREE, CanaryRow(jnp.zeros(4), jnp.int32(5)))
    expected = canaries.contribution(5, TREE)
    jax.tree.map(np.testing.assert_array_equal, planted, expected)
    real = gradient(TREE, CanaryRow(jnp.ones(4), jnp.int32(-1)))
    jax.tree.map(np.testing.assert_array_equal, real, jax.grad(row_loss)(TREE, jnp.ones(4)))


def test_the_training_codes_clip_leaves_each_canary_one_clip_norm() -> None:
    """Through the code of DP-SGD: the sum is the sum of the directions that take part."""
    canaries = drawn(scale=1e3)
    coins_M = toss(jax.random.key(1), 64)
    table = plant(ClientTable(jnp.zeros((6, 4)), jnp.int32(5), jnp.float32(1)), coins_M, 0.25)
    assert int(table.population) == 5 + int(coins_M.sum())
    assert table.rate == 0.25
    indices_N = jnp.arange(table.rows.canary.shape[0], dtype=jnp.int32)
    total, stats = poisson_clipped_grad_sum(
        with_canaries(row_loss, canaries), TREE, table.rows, indices_N, table.population, 0.5, 8
    )
    scores_M = canaries.project(total)
    np.testing.assert_allclose(scores_M, 0.5 * np.asarray(coins_M), rtol=1e-3, atol=1e-5)
    assert int(stats.clipped) == int(coins_M.sum())


def test_coins_are_fair() -> None:
    assert abs(int(toss(jax.random.key(0), 10_000).sum()) - 5000) < 4 * 50


def test_scores_are_log_likelihood_ratios() -> None:
    canaries, scorer = drawn(8), Scorer(rate=0.3, length=2.0, stddev=1.5)
    released = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(7), leaf.shape), TREE)
    x_M = np.asarray(canaries.project(released), np.float64)
    ratio_M = 0.7 + 0.3 * np.exp((x_M * 2.0 - 2.0) / 1.5**2)
    scores_M = scorer.add(canaries, scorer.init(canaries), released)
    np.testing.assert_allclose(scores_M, np.log(ratio_M), rtol=1e-4)


def test_an_observed_optimiser_takes_the_same_steps_and_sees_the_sum() -> None:
    """Adam included: what is scored is what it was handed."""
    canaries, scorer = drawn(8), Scorer(1.0, 1.0, 1.0)
    plain, watched = optax.adam(0.1), observed(optax.adam(0.1), canaries, scorer, 4.0)
    params = ravel_pytree(TREE)[0]
    gradient = jax.random.normal(jax.random.key(2), params.shape)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = plain.update(gradient, plain.init(params), params)
        step, (_, scores_M) = watched.update(gradient, watched.init(params), params)
    np.testing.assert_array_equal(step, expected)
    np.testing.assert_allclose(scores_M, canaries.project(4 * gradient) - 0.5, rtol=1e-5)
