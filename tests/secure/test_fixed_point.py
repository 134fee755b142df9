"""Rounding against exact rational arithmetic, and the clip norm by adversarial vectors."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.fixed_point import OUT_OF_BOUND, FixedPoint
from fedjax_llm.secure.sums import checked_ints

bits = st.integers(2, 31)
bounds = st.floats(1e-6, 1e6)


@settings(max_examples=150, deadline=None)
@given(bits, bounds, st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8))
def test_rounds_to_the_nearest_step_and_stays_within_the_bound(bits, bound, fractions):
    codec = FixedPoint(bits, bound, summands=8)
    edge = np.float32(codec._bound32)
    x = np.array([*(np.float32(f) * edge for f in fractions), edge, -edge], np.float32)
    x = x[np.abs(x) <= edge]
    ints = np.asarray(codec.encode(jnp.asarray(x)))
    assert ints.dtype == np.int32
    assert np.abs(ints.astype(np.int64)).max() <= codec.max_int
    step = Fraction(codec.step)
    for value, integer in zip(x, ints, strict=True):
        assert abs(Fraction(float(value)) - int(integer) * step) <= step / 2


@settings(max_examples=100, deadline=None)
@given(bits, bounds)
def test_step_is_the_smallest_sufficient_power_of_two(bits, bound):
    codec = FixedPoint(bits, bound, summands=1)
    step = Fraction(codec.step)
    assert step * codec.max_int >= Fraction(bound)
    assert step / 2 * codec.max_int < Fraction(bound)
    assert np.frexp(codec.step)[0] == 0.5


def test_mean_of_decoded_sum_is_off_by_half_a_step_at_most():
    codec = FixedPoint(16, 1.5, summands=7)
    x_KxP = np.random.default_rng(0).uniform(-1.5, 1.5, (7, 1000)).astype(np.float32)
    ints_KxP = np.asarray(jax.jit(jax.vmap(codec.encode))(jnp.asarray(x_KxP)))
    total_P = ints_KxP.astype(np.int64).sum(0)
    error = np.abs(codec.decode64(total_P) / 7 - x_KxP.astype(np.float64).mean(0))
    assert error.max() <= codec.step / 2 * (1 + 1e-12)
    assert codec.decode(total_P).dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.0001, -3e38])
def test_what_cannot_be_encoded_is_flagged_and_refused(value):
    codec = FixedPoint(8, 1.0, summands=4)
    x = jnp.asarray(np.array([0.5, value, -1.0], np.float32))
    ints = np.asarray(codec.encode(x))
    assert ints[1] == OUT_OF_BOUND and (np.abs(ints[[0, 2]]) <= codec.max_int).all()
    message = "client 'alice': entry 1 .* bound 127: it was not finite or out of bounds when it was"
    with pytest.raises(Refused, match=message):
        checked_ints("alice", ints, 3, codec.max_int)
    checked_ints("alice", ints[::2], 2, codec.max_int)


def test_overflow_and_nonsense_are_refused_by_value():
    for wrong in ({"bits": 1}, {"bits": 32}, {"bound": 0.0}, {"bound": float("nan")}):
        with pytest.raises(UserError):
            FixedPoint(**({"bits": 8, "bound": 1.0, "summands": 4} | wrong))
    with pytest.raises(UserError, match="overflow int64"):
        FixedPoint(31, 1.0, summands=2**34)
    assert FixedPoint(24, 1.0, summands=256).fits_int32
    assert not FixedPoint(24, 1.0, summands=257).fits_int32


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 16), st.floats(0.1, 10), st.integers(1, 500), st.integers(0, 2**31))
def test_rounded_vector_keeps_the_promised_norm(bits, clip_norm, size, seed):
    codec = FixedPoint(bits, clip_norm, summands=2)
    try:
        reduced = codec.clip_norm_before_rounding(clip_norm, size)
    except Refused:
        assert codec.step * np.sqrt(size) / 2 >= clip_norm
        return
    rng = np.random.default_rng(seed)
    # The worst vectors sit half a step (and a little) above multiples, in all coordinates.
    x = (rng.integers(0, 3, size) + 0.5001) * codec.step * rng.choice([-1, 1], size)
    for candidate in (x, rng.normal(size=size)):
        candidate = candidate * min(1.0, reduced * (1 - 1e-6) / np.linalg.norm(candidate))
        sent = codec.decode64(np.asarray(codec.encode(jnp.asarray(candidate, jnp.float32))))
        assert np.linalg.norm(sent) <= clip_norm
