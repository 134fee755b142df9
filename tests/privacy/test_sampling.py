"""Poisson samples are exact: counts, inclusions and independence; shuffles are even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import float32_rate, poisson_sample, uniform_batches

SIZE = 64
draw_many = jax.jit(
    lambda key, n, population, rate: jax.vmap(lambda k: poisson_sample(k, population, rate, SIZE))(
        jax.random.split(key, n)
    ),
    static_argnums=1,
)


def inclusions(indices_TxN, count_T):
    """[T, N] bool: was entry i in sample t?"""
    found = np.zeros(indices_TxN.shape, bool)
    for t, (row, count) in enumerate(zip(indices_TxN, count_T, strict=True)):
        found[t, row[:count]] = True
    return found


@given(
    st.integers(0, 2**31 - 1),
    st.integers(0, SIZE),
    st.sampled_from([0.0, 1e-9, 0.03, 0.5, 0.999, 1.0]),
)
@settings(deadline=None, max_examples=80)
def test_layout(seed, population, rate):
    indices, count = jax.jit(poisson_sample, static_argnums=3)(
        jax.random.key(seed), population, rate, SIZE
    )
    assert indices.shape == (SIZE,) and indices.dtype == jnp.int32 and count.dtype == jnp.int32
    selected = np.asarray(indices[: int(count)])
    assert (np.diff(selected) > 0).all() and (selected < population).all()
    assert not np.asarray(indices[int(count) :]).any()
    if rate == 1.0:
        assert int(count) == population
    if rate == 0.0:
        assert int(count) == 0


@pytest.mark.parametrize(("rate", "population"), [(0.05, 60), (0.5, 64), (0.9, 33)])
def test_binomial_counts_and_even_independent_inclusion(rate, population):
    trials = 20_000
    indices, counts = map(np.asarray, draw_many(jax.random.key(7), trials, population, rate))
    variance = population * rate * (1 - rate)
    # Five standard errors: a fixed key passes or fails for good, a wrong rate fails.
    assert abs(counts.mean() - population * rate) < 5 * np.sqrt(variance / trials)
    assert abs(counts.var() / variance - 1) < 5 * np.sqrt(3 / trials)
    found = inclusions(indices, counts)
    frequency = found.mean(axis=0)
    assert not frequency[population:].any()
    error = np.sqrt(rate * (1 - rate) / trials)
    assert np.abs(frequency[:population] - rate).max() < 5 * error
    covariance = np.cov(found[:, :population].T.astype(float))
    off = covariance[~np.eye(population, dtype=bool)]
    assert np.abs(off).max() < 6 * rate * (1 - rate) / np.sqrt(trials)


def test_keys_give_independent_samples_and_the_same_key_the_same():
    a, b = (draw_many(jax.random.key(s), 4000, SIZE, 0.5) for s in (1, 2))
    one, two = inclusions(*map(np.asarray, a)), inclusions(*map(np.asarray, b))
    assert abs((one == two).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)
    again = draw_many(jax.random.key(1), 4000, SIZE, 0.5)
    np.testing.assert_array_equal(a[0], again[0])


def test_padding_and_population_do_not_change_who_is_selected():
    key = jax.random.key(3)
    small, few = poisson_sample(key, 20, 0.5, 20)
    large, many = poisson_sample(key, 40, 0.5, 100)
    large = large[: int(many)]
    np.testing.assert_array_equal(small[: int(few)], large[large < 20])


@pytest.mark.parametrize("rate", [1.5 * 2.0**-23, 0.1, 1 / 3, 1 - 2.0**-24])
def test_inclusion_is_decided_on_all_32_bits_and_never_above_the_rate(rate):
    # A rate of 1.5 * 2^-23 would become 2 * 2^-23 with float32 uniforms.
    n, key, rate = 2**20, jax.random.key(0), float32_rate(rate)
    words = np.asarray(jax.random.bits(key, (n,), jnp.uint32), np.float64)
    indices, count = jax.jit(poisson_sample, static_argnums=3)(key, n, rate, n)
    expected = np.flatnonzero(words < np.floor(rate * 2.0**32))
    np.testing.assert_array_equal(indices[: int(count)], expected)
    assert 0 <= rate - np.floor(rate * 2.0**32) / 2.0**32 < 2.0**-32


def test_rates_outside_the_interval():
    key = jax.random.key(0)
    assert int(poisson_sample(key, 10, 2.0, 10)[1]) == 10
    assert int(poisson_sample(key, 10, -1.0, 10)[1]) == 0
    assert int(poisson_sample(key, 10, float("nan"), 10)[1]) == 0


def test_clients_of_different_sizes_in_one_program():
    keys = jax.random.split(jax.random.key(5), 3)
    populations, rates = jnp.array([0, 10, 64]), jnp.array([0.5, 0.2, 0.1])
    indices, counts = jax.jit(
        jax.vmap(lambda k, p, r: poisson_sample(k, p, r, SIZE)),
    )(keys, populations, rates)
    for c in range(3):
        alone, count = poisson_sample(keys[c], populations[c], rates[c], SIZE)
        np.testing.assert_array_equal(indices[c], alone)
        assert int(counts[c]) == int(count)


@given(st.floats(1e-30, 1.0))
def test_float32_rate_never_rounds_up(rate):
    rounded = float32_rate(rate)
    assert rate * (1 - 2.0**-23) <= rounded <= rate and float(np.float32(rounded)) == rounded


@given(st.integers(0, 1000), st.integers(1, 16), st.integers(1, 5), st.integers(1, 7))
@settings(deadline=None, max_examples=25)
def test_uniform_batches_use_everyone_equally(seed, population, steps, batch):
    indices = np.asarray(
        uniform_batches(jax.random.key(seed), jnp.int32(population), 16, steps, batch)
    )
    assert indices.shape == (steps, batch)
    uses = np.bincount(indices.ravel(), minlength=population)
    assert len(uses) == population and uses.max() - uses.min() <= 1


def test_uniform_batches_are_shuffled_evenly():
    keys = jax.random.split(jax.random.key(0), 6000)
    first = jax.vmap(lambda k: uniform_batches(k, 6, 8, 1, 1))(keys).ravel()
    counts = np.bincount(np.asarray(first), minlength=6)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)


def test_uniform_batches_user_errors():
    with pytest.raises(UserError, match="batch must be at least 1, got 0"):
        uniform_batches(jax.random.key(0), 3, 3, 1, 0)
