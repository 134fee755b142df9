"""One client's update against a plain NumPy account of the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.training import (
    OPTIMIZERS,
    ClientMetrics,
    ClientTable,
    ExamplePrivacy,
    LocalTraining,
    client_update,
    each_row,
    optimizer_init,
)

ROWS, WIDTH = 13, 5


def problem() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(ROWS, WIDTH)).astype(np.float32), np.ones(WIDTH, np.float32)


def row_loss(params: dict[str, jax.Array], row: jax.Array) -> jax.Array:
    """Its gradient is (w . x - 1) x: different for every row and easy to write down."""
    return 0.5 * jnp.square(jnp.sum(params["w"] * row) - 1.0)


def gradients(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (x @ w - 1.0)[:, None] * x


def updates(
    training: LocalTraining, rate: float, seeds: int = 1
) -> tuple[np.ndarray, ClientMetrics]:
    """The parameters and metrics after a client's update, for each of several seeds."""
    x, w = problem()
    params = {"w": jnp.asarray(w)}
    padded = np.concatenate([x, np.full((4, WIDTH), 1e6, np.float32)])
    table = ClientTable(jnp.asarray(padded), jnp.int32(ROWS), jnp.float32(rate))
    state = optimizer_init(training.optimizer, params)

    def one(key: jax.Array) -> tuple[jax.Array, ClientMetrics]:
        sampling, noise = jax.random.split(key)
        done = client_update(each_row(row_loss), training, params, state, table, sampling, noise)
        return done.trainable["w"], done.metrics

    after, metrics = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))
    return np.asarray(after), metrics


def update(training: LocalTraining, rate: float) -> tuple[np.ndarray, ClientMetrics]:
    after, metrics = updates(training, rate)
    return after[0], jax.tree.map(lambda leaf: leaf[0], metrics)


def clipped_steps(steps: int, clip: float, batch: int, rate: float) -> np.ndarray:
    x, w = problem()
    for _ in range(steps):
        grads = gradients(w, x)
        norms = np.linalg.norm(grads, axis=1, keepdims=True)
        w = w - rate * (grads * np.minimum(1, clip / norms)).sum(0) / batch
    return w


@pytest.mark.parametrize("microbatch", [1, 4, 13, 32])
def test_private_steps_without_noise_are_clipped_gradient_descent(microbatch: int) -> None:
    """At rate 1 every real row takes part and no padding does, whatever the micro-batch."""
    privacy = ExamplePrivacy(clip_norm=0.7, noise_multiplier=0.0)
    training = LocalTraining(optax.sgd(0.3), 3, 10, microbatch, privacy)
    after, metrics = update(training, 1.0)
    np.testing.assert_allclose(after, clipped_steps(3, 0.7, 10, 0.3), rtol=2e-4)
    assert metrics.rows == 3 * ROWS


def test_noise_has_the_scale_of_the_plan_and_differs_by_step() -> None:
    """Two steps at learning rate 1 leave the sum of two independent draws."""
    privacy = ExamplePrivacy(clip_norm=0.5, noise_multiplier=3.0)
    quiet = ExamplePrivacy(clip_norm=1e-9, noise_multiplier=0.0)
    start, _ = update(LocalTraining(optax.sgd(1.0), 2, 10, 4, quiet), 0.5)
    noisy, _ = updates(LocalTraining(optax.sgd(1.0), 2, 10, 4, privacy), 1e-6, seeds=60)
    draws = (noisy - start).ravel()
    expected = 3.0 * 0.5 / 10 * np.sqrt(2)
    assert abs(draws.std() / expected - 1) < 5 / np.sqrt(2 * draws.size)


def test_plain_training_walks_through_every_row() -> None:
    """Four batches of four cover thirteen rows; a gradient step with each is not zero."""
    _, metrics = update(LocalTraining(optax.sgd(0.01), 4, 4, 3), 0.0)
    x, w = problem()
    every_row_once = 0.5 * np.square(x @ w - 1)
    assert metrics.rows == 16
    # Three rows are taken twice, the other ten once; the parameters hardly move at this rate.
    low = every_row_once.sum() + np.sort(every_row_once)[:3].sum()
    high = every_row_once.sum() + np.sort(every_row_once)[-3:].sum()
    assert 0.5 * low < metrics.loss_sum < 1.05 * high


def test_plain_training_does_not_depend_on_the_microbatch() -> None:
    one, _ = update(LocalTraining(optax.sgd(0.1), 3, 6, 1), 0.0)
    other, _ = update(LocalTraining(optax.sgd(0.1), 3, 6, 4), 0.0)
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimiser_lowers_the_loss(name: str) -> None:
    x, w = problem()
    after, _ = update(LocalTraining(OPTIMIZERS[name](0.02), 20, 6, 6), 0.0)
    assert np.square(x @ after - 1).mean() < np.square(x @ w - 1).mean()


@pytest.mark.parametrize("private", [False, True])
def test_a_client_that_stops_early_ends_as_one_with_fewer_steps(private: bool) -> None:
    """Beside one that goes on for longer; only its own steps are measured."""
    x, w = problem()
    privacy = ExamplePrivacy(0.5, 0.3) if private else None
    table = ClientTable(jnp.asarray(x), jnp.int32(ROWS), jnp.float32(0.4))
    params = {"w": jnp.asarray(w)}

    def run(steps: int, taken: list[int] | None) -> tuple[np.ndarray, ClientMetrics]:
        training = LocalTraining(optax.adam(0.1), steps, 4, 2, privacy)
        state = optimizer_init(training.optimizer, params)

        def one(own: jax.Array | None) -> tuple[jax.Array, ClientMetrics]:
            keys = jax.random.key(1), jax.random.key(2)
            done = client_update(each_row(row_loss), training, params, state, table, *keys, own)
            return done.trainable["w"], done.metrics

        if taken is None:
            after, metrics = jax.jit(lambda: one(None))()
            return np.asarray(after)[None], metrics
        after, metrics = jax.jit(jax.vmap(one))(jnp.array(taken, jnp.int32))
        return np.asarray(after), metrics

    together, metrics = run(5, [2, 5])
    rows = np.asarray(metrics.rows)
    assert rows[0] < rows[1]
    if private:
        # Samples and noise are addressed by the step alone.
        alone, own = run(2, None)
        np.testing.assert_allclose(together[0], alone[0], rtol=1e-6)
        assert float(own.rows) == rows[0]
    whole, own = run(5, None)
    np.testing.assert_allclose(together[1], whole[0], rtol=1e-6)
    assert float(own.rows) == rows[1]
