"""A client's own batch size under the shapes of the largest: as if there were no other.

What is claimed of example privacy: the noised sum of a step does not depend on the batch size but
through the sampling rate; the batch size divides what has been noised already.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.privacy import AdaptiveClip, uniform_batches
from fedjax_llm.privacy.correlated import Banded
from fedjax_llm.training import (
    ClientTable,
    ExamplePrivacy,
    LocalTraining,
    client_update,
    each_row,
    optimizer_init,
)
from fedjax_llm.training.example_privacy import NoiseStream

ROWS, WIDTH, MOST, STEPS = 13, 5, 7, 3


def row_loss(params: dict[str, jax.Array], row: jax.Array) -> jax.Array:
    return 0.5 * jnp.square(jnp.sum(params["w"] * row) - 1.0)


def updated(
    batch_size: int,
    batch: int | None = None,
    privacy: ExamplePrivacy | None = None,
    rate: float = 0.4,
    microbatch: int = 2,
    steps: int = STEPS,
    learning_rate: float = 0.1,
) -> Any:
    """A client's update by its own number among larger ones, or by that number alone."""
    draw = np.random.default_rng(0)
    rows = jnp.asarray(draw.normal(size=(ROWS + 2, WIDTH)), jnp.float32)
    params = {"w": jnp.ones(WIDTH, jnp.float32)}
    training = LocalTraining(optax.sgd(learning_rate), steps, batch_size, microbatch, privacy)
    table = ClientTable(rows, jnp.int32(ROWS), jnp.float32(rate))
    stream = None
    if privacy is not None:
        correlation = privacy.correlation
        state = () if correlation is None else correlation.init(params)
        stream = NoiseStream(jnp.int32(0), jax.random.key(3), state, privacy.clip_state())

    def one(batch: jax.Array | None) -> Any:
        return client_update(
            each_row(row_loss),
            training,
            params,
            optimizer_init(training.optimizer, params),
            table,
            jax.random.key(1),
            jax.random.key(2),
            stream=stream,
            batch=batch,
        )

    done = jax.jit(one)(None if batch is None else jnp.int32(batch))
    return done.trainable["w"], done.metrics, done.clip


def assert_alike(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), one, other)


@given(
    population=st.integers(1, ROWS),
    batch=st.integers(1, MOST),
    own=st.integers(1, MOST),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=40, deadline=None)
def test_draws_are_those_of_the_number_alone(
    population: int, batch: int, own: int, seed: int
) -> None:
    own = min(own, batch)
    key = jax.random.key(seed)
    alone_SxB = uniform_batches(key, population, ROWS, STEPS, own)
    found_SxB = uniform_batches(key, population, ROWS, STEPS, batch, jnp.int32(own))
    np.testing.assert_array_equal(found_SxB[:, :own], alone_SxB)
    assert not np.asarray(found_SxB)[:, own:].any()


@pytest.mark.parametrize("batch", [1, 2, 4, MOST])
@pytest.mark.parametrize("microbatch", [2, MOST])
def test_masked_rows_are_as_if_they_were_not_there(batch: int, microbatch: int) -> None:
    """Also where all of a micro-batch is masked, and where rows come round a second time."""
    found = updated(MOST, batch, microbatch=microbatch)
    assert_alike(found, updated(batch, microbatch=microbatch))
    assert found[1].rows == batch * STEPS
    others = [updated(MOST, other)[0] for other in range(1, MOST + 1) if other != batch]
    assert all(not np.allclose(found[0], other, rtol=1e-4) for other in others)


PRIVATE = {
    "plain": ExamplePrivacy(0.5, 0.8),
    "adaptive": ExamplePrivacy(0.5, 1.2, adaptive=AdaptiveClip(0.5, 0.5, 0.3, 2.0)),
    "banded": ExamplePrivacy(0.5, 0.8, Banded(STEPS, 2)),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_private_steps_are_those_of_the_number_alone(kind: str) -> None:
    """Sum, noise, count and correlation at the same rate; the moved clip norm among them."""
    found = updated(MOST, 3, PRIVATE[kind])
    assert_alike(found, updated(3, privacy=PRIVATE[kind]))
    assert not np.allclose(found[0], updated(MOST, privacy=PRIVATE[kind])[0], rtol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_the_noised_sum_does_not_know_the_batch_size(rate: float) -> None:
    """One step of sgd is minus that sum over the batch size, empty samples included.

    Were the noise scaled by the batch size, or the clip, the products would differ.
    """
    privacy = ExamplePrivacy(0.5, 0.8)

    def released(batch: int) -> np.ndarray:
        moved = updated(MOST, batch, privacy, rate, steps=1, learning_rate=1.0)[0]
        return np.asarray((1.0 - moved) * batch)

    sums = [released(batch) for batch in (1, 3, MOST)]
    assert np.abs(sums[0]).max() > 1e-2
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0], rtol=1e-4, atol=1e-5)


def test_who_fills_up_a_cohort_leaves_no_nan() -> None:
    """Padding has no rows and a batch of none."""
    for privacy in (None, PRIVATE["plain"], PRIVATE["adaptive"]):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updated(MOST, 0, privacy)))
