"""Stochastic rounding: its mean, its range, and the length that it may reach."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.compression import (
    dequantise,
    largest_integer,
    least_error_cut,
    longest,
    norm_before_rounding,
    quantise,
    quantise_within,
    step_for,
)
from fedjax_llm.compression.rounding import INVALID
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.fixed_point import OUT_OF_BOUND

SIZE = 48
_quantise = jax.jit(quantise, static_argnums=3)
_draws = jax.jit(jax.vmap(quantise, in_axes=(0, None, None, None)), static_argnums=3)
_within = jax.jit(quantise_within, static_argnums=3)
numbers = st.lists(st.floats(-1, 1, width=32), min_size=SIZE, max_size=SIZE)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 16), st.floats(1e-6, 1e6), numbers, st.integers(0, 2**31))
def test_one_of_the_two_neighbours_comes_up(bits, bound, fractions, seed):
    """In exact arithmetic, but for the product with 1 / d, which float32 rounds."""
    step, largest = np.float32(step_for(bound, bits)), largest_integer(bits)
    y = (np.array(fractions) * bound).astype(np.float32)
    ints = np.asarray(_quantise(jax.random.key(seed), jnp.asarray(y), step, largest))
    assert ints.dtype == np.int32 and np.abs(ints).max() <= largest
    for value, integer in zip(y, ints, strict=True):
        exact = Fraction(float(value)) / Fraction(float(step))
        assert abs(exact - int(integer)) < 1 + abs(exact) / 2**21


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_multiples_and_both_ends_are_exact(bits):
    largest = largest_integer(bits)
    ints = np.unique(np.linspace(-largest, largest, 41).astype(np.int32))
    step = jnp.float32(0.25)
    for seed in range(20):
        found = _quantise(jax.random.key(seed), dequantise(jnp.asarray(ints), step), step, largest)
        assert np.array_equal(found, ints)


def test_the_mean_over_keys_is_the_number():
    """4,000 draws of each: within 4.5 standard errors; and the errors of numbers do not agree."""
    y = jnp.asarray(np.linspace(-6.9, 6.9, 301), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    ints = np.asarray(_draws(keys, y, 1.0, 7), np.float64)
    part = np.abs(np.asarray(y, np.float64)) % 1
    deviation = np.sqrt(part * (1 - part) / len(keys))
    mean = ints.mean(0) - np.asarray(y, np.float64)
    assert np.all(np.abs(mean) <= 4.5 * deviation + 1e-6)
    np.testing.assert_allclose(ints.std(0), np.sqrt(part * (1 - part)), atol=0.03)
    together = np.corrcoef(ints[:, 10], ints[:, 11])[0, 1]
    assert abs(together) < 4.5 / math.sqrt(len(keys))


def test_beyond_the_range_is_cut_and_what_is_not_finite_is_flagged():
    y = jnp.asarray([8.0, -1e30, 3e38, np.nan, np.inf, -np.inf, -0.0, 1e-45], jnp.float32)
    for seed in range(10):
        found = _quantise(jax.random.key(seed), y, 1.0, 7)
        assert found.tolist() == [7, -7, 7, INVALID, INVALID, INVALID, 0, 0]
    assert INVALID == OUT_OF_BOUND  # which secure sums refuse


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 10), st.integers(0, 2**31), st.floats(0.01, 40))
def test_the_certain_bound_holds_for_the_worst_outcome(bits, seed, scale):
    """Every coordinate rounded away from zero."""
    draw = np.random.default_rng(seed)
    y = draw.normal(size=SIZE) * scale
    largest = largest_integer(bits)
    y = np.clip(y, -largest, largest).astype(np.float32).astype(np.float64)
    worst = np.minimum(np.ceil(np.abs(y)), largest)
    assert np.linalg.norm(worst) <= longest(np.linalg.norm(y), SIZE, 1.0) * (1 + 1e-12)


@pytest.mark.parametrize("failure", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_likely_bound_fails_as_seldom_as_stated(failure, scale):
    """2,000 draws: at most 4 standard errors more than stated; halves have the largest variance."""
    draws = 2000
    y = jnp.asarray(np.random.default_rng(1).choice([-0.5, 0.5], SIZE) * scale, jnp.float32)
    keys = jax.random.split(jax.random.key(2), draws)
    ints = np.asarray(_draws(keys, y, 1.0, 127), np.float64)
    bound = longest(float(np.linalg.norm(y)), SIZE, 1.0, failure)
    share = np.mean(np.linalg.norm(ints, axis=1) > bound)
    assert share <= failure + 4 * math.sqrt(failure / draws)
    assert bound < longest(float(np.linalg.norm(y)), SIZE, 1.0)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.01, 10), st.sampled_from([0.0, 0.3, 0.999]), st.integers(0, 2**31))
def test_no_draw_is_longer_than_the_norm_that_was_set(norm, slack, seed):
    """Also where no draw can be short enough, so that it rounds towards zero."""
    draw = np.random.default_rng(seed)
    y = draw.choice([-1, 1], SIZE) * draw.integers(0, 4, SIZE) + draw.uniform(-0.5, 0.5, SIZE)
    y = y * norm * (1 - slack) / np.linalg.norm(y) / (1 + 2.0**-20)
    step = norm / draw.uniform(1, 20)
    ints = _within(jax.random.key(seed), jnp.asarray(y, jnp.float32), step, 127, norm)
    sent = np.asarray(ints, np.float64) * float(np.float32(step))
    assert np.linalg.norm(sent) <= norm * (1 + 1e-6)


def test_conditional_rounding_is_plain_rounding_where_there_is_room():
    y = jnp.asarray(np.random.default_rng(4).normal(size=SIZE), jnp.float32)
    room = longest(float(jnp.linalg.norm(y)), SIZE, 0.25)
    keys = jax.random.split(jax.random.key(5), 500)
    ints = jax.vmap(lambda key: _within(key, y, 0.25, 127, room))(keys)
    found = np.asarray(dequantise(ints, 0.25), np.float64)
    steps = np.abs(np.asarray(y, np.float64)) / 0.25 % 1
    deviation = 0.25 * np.sqrt(steps * (1 - steps) / len(keys))
    assert np.all(np.abs(found.mean(0) - np.asarray(y)) <= 4.5 * deviation + 1e-6)
    assert (np.asarray(ints).std(0) > 0).sum() > SIZE // 2


def test_conditional_rounding_flags_what_is_not_finite():
    y = jnp.asarray([1.0, np.nan, np.inf, 0.2], jnp.float32)
    ints = np.asarray(_within(jax.random.key(0), y, 0.5, 7, 2.0))
    assert (ints[[1, 2]] == INVALID).all()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.1, 100),
    st.integers(1, 10**6),
    st.floats(1e-6, 1e-2),
    st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_the_norm_before_is_the_largest_that_fits(clip_norm, count, step, failure):
    if longest(0.0, count, step, failure) >= clip_norm:
        with pytest.raises(Refused, match="use more bits, or rotate the message first"):
            norm_before_rounding(clip_norm, count, step, failure)
        return
    norm = norm_before_rounding(clip_norm, count, step, failure)
    assert longest(norm, count, step, failure) <= clip_norm
    assert longest(norm * (1 + 1e-9) + 1e-12, count, step, failure) > clip_norm


def test_four_bits_of_a_rotated_message_fit_a_clip_norm_only_with_conditional_rounding():
    """The case that it is there for: 69,120 numbers, norm 1, bound of the rotation at 1e-6."""
    count, bound = 69_120, 0.0282
    step = step_for(bound, 4)
    with pytest.raises(Refused, match=r"rounding 69120 numbers to steps of 0\.00402857"):
        norm_before_rounding(1.0, count, step)
    assert norm_before_rounding(1.0, count, step, failure=0.5) > 0.8


@pytest.mark.parametrize(("bits", "clients"), [(2, 1), (4, 1), (4, 8), (8, 8)])
def test_no_other_cut_of_normal_numbers_has_a_smaller_error(bits, clients):
    """Measured on 20,000 numbers, each client's rounding drawn; beside cuts a fifth away."""
    z = jnp.asarray(np.random.default_rng(3).normal(size=20_000), jnp.float32)
    largest = largest_integer(bits)

    def error(cut):
        keys = jax.random.split(jax.random.key(6), clients)
        ints_K = _draws(keys, z, step_for(cut, bits), largest)
        mean = np.asarray(ints_K, np.float64).mean(0) * step_for(cut, bits)
        return np.mean((mean - np.asarray(z)) ** 2)

    best = least_error_cut(bits, clients)
    assert error(best) < min(error(0.8 * best), error(1.25 * best))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: largest_integer(1), r"bits of stochastic rounding must be in \[2, 16\], got 1;"),
        (lambda: largest_integer(17), "got 17; 8 loses next to nothing"),
        (lambda: step_for(0.0, 8), r"must be in \(0, 2\^100\], got 0"),
        (lambda: step_for(math.nan, 8), "got nan"),
        (lambda: least_error_cut(4, 0), "clients of a mean must be at least 1, got 0"),
        (lambda: longest(1.0, 2, 0.1, 1.0), r"failure must be in \[0, 1\), got 1;"),
    ],
)
def test_nonsense_is_refused_by_value(call, message):
    with pytest.raises(UserError, match=message):
        call()
