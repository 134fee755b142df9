"""One example more or less moves what a client's step is computed from by at most the clip norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.training import ClientTable, ExamplePrivacy, LocalTraining, client_update, each_row

SIZE, CLIP, BATCH = 16, 0.25, 4


def row_loss(params: dict[str, jax.Array], row: jax.Array) -> jax.Array:
    """Gradients of wildly different lengths in both leaves, also beyond the clip norm."""
    return jnp.sum(params["a"] * row[:3]) + jnp.sum(jnp.square(params["b"]) * row[3:])


def updated(rows: np.ndarray, population: int, rate: float, steps: int = 1) -> dict[str, Any]:
    training = LocalTraining(optax.sgd(1.0), steps, BATCH, 3, ExamplePrivacy(CLIP, 1.0))
    params = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    table = ClientTable(jnp.asarray(rows), jnp.int32(population), jnp.float32(rate))
    state = training.optimizer.init(jax.flatten_util.ravel_pytree(params)[0])
    done = jax.jit(
        lambda p, s, t: client_update(
            each_row(row_loss), training, p, s, t, jax.random.key(1), jax.random.key(2)
        )
    )(params, state, table)
    return jax.tree.map(np.asarray, done.trainable)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(one[k] - other[k])) for k in one)))


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e6, np.inf])
def test_one_example_moves_a_step_by_at_most_the_clip_norm(scale: float) -> None:
    """Same keys, so the noise cancels; the divisor is public and does not follow the sample."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(SIZE, 5)).astype(np.float32)
    rows[7] *= scale
    without = updated(rows, 7, 1.0)
    moved = distance(updated(rows, 8, 1.0), without) * BATCH
    assert moved <= CLIP * (1 + 1e-5)
    if scale == 1e6:
        assert moved > CLIP * 0.999  # and the bound is attained, over both leaves together


def test_rows_beyond_the_population_are_never_read() -> None:
    rows = np.random.default_rng(1).normal(size=(SIZE, 5)).astype(np.float32)
    other = rows.copy()
    other[9:] = np.nan
    assert distance(updated(rows, 9, 0.5, 3), updated(other, 9, 0.5, 3)) == 0


def test_an_empty_sample_sends_noise() -> None:
    """A step without examples must not be told apart by a missing update."""
    rows = np.ones((SIZE, 5), np.float32)
    after = updated(rows, SIZE, 0.0)
    assert np.all(after["a"] != 0) and np.all(after["b"] != 1)
