"""The clip norm that follows a quantile: what is spent, and that it arrives."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import AdaptiveClip, AdaptiveClipState, indicator, split_noise


@given(st.floats(width=32, allow_nan=True, allow_infinity=True), st.floats(0, 8, width=32))
def test_an_indicator_is_half_or_minus_half(norm, bound):
    found = float(indicator(jnp.float32(norm), bound))
    # A subnormal may be flushed to zero on either side.
    norm, bound = (0.0 if 0 < x < np.finfo(np.float32).tiny else x for x in (norm, bound))
    assert found == (0.5 if norm <= bound else -0.5)


@given(st.floats(1e-3, 1e3), st.floats(1.0000001, 1e6))
@settings(max_examples=300)
def test_sum_and_count_together_cost_the_joint_mechanism(z, times):
    """Over their noise, one unit moves the pair by at most 1 / z and hardly less."""
    sigma_b = z / 2 * times
    z_delta = split_noise(z, sigma_b)
    assert z_delta > z
    moved = 1 / z_delta**2 + (0.5 / sigma_b) ** 2
    assert moved <= (1 + 1e-9) / z**2
    assert moved >= (1 - 1e-9) / z**2


def test_split_noise_is_the_papers_formula_and_is_rounded_up():
    assert split_noise(1.0, 5.0) == pytest.approx((1 - 0.01) ** -0.5, rel=1e-12)
    assert split_noise(1.0, 1e300) >= 1.0


@pytest.mark.parametrize("sigma_b", [0.5, 0.25, 0.5 * (1 - 1e-12)])
def test_a_count_that_costs_all_is_refused(sigma_b):
    with pytest.raises(UserError, match="count_stddev must be above half the noise multiplier 1"):
        split_noise(1.0, sigma_b)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_settings_that_mean_nothing_are_refused(bad):
    for arguments in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(UserError, match="must be positive and finite"):
            split_noise(*arguments)
    good = {"initial_norm": 1.0, "quantile": 0.5, "learning_rate": 0.2, "count_stddev": 1.0}
    for name in good:
        with pytest.raises(UserError, match=name):
            AdaptiveClip(**{**good, name: bad})
    with pytest.raises(UserError, match="quantile must be in"):
        AdaptiveClip(**{**good, "quantile": 1.0})


adaptive = AdaptiveClip(initial_norm=0.1, quantile=0.5, learning_rate=0.2, count_stddev=5.0)


def test_update_is_the_geometric_one():
    state = adaptive.init()
    assert float(state.clip_norm) == np.float32(0.1)
    everyone = adaptive.update(state, 50.0, 100.0)
    nobody = adaptive.update(state, -50.0, 100.0)
    target = adaptive.update(state, 0.0, 100.0)
    assert float(everyone.clip_norm) == pytest.approx(0.1 * math.exp(-0.2 * 0.5), rel=1e-6)
    assert float(nobody.clip_norm) == pytest.approx(0.1 * math.exp(0.2 * 0.5), rel=1e-6)
    assert float(target.clip_norm) == pytest.approx(0.1, rel=1e-6)


@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
@settings(deadline=None)
def test_the_norm_stays_positive_and_finite_whatever_the_noise(count):
    after = float(adaptive.update(adaptive.init(), count, 10.0).clip_norm)
    assert 2.0**-60 <= after <= 2.0**60
    if not math.isfinite(count):
        assert after == np.float32(0.1)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_the_norm_arrives_at_the_quantile_under_noise_and_sampling(quantile):
    rate, units = 0.25, 400
    norms_N = jnp.asarray(np.random.default_rng(0).lognormal(1.0, 0.7, units), jnp.float32)
    follow = AdaptiveClip(0.01, quantile, 0.2, 5.0)

    @jax.jit
    def step(state: AdaptiveClipState, key):
        chosen, noise = jax.random.split(key)
        takes_part = jax.random.uniform(chosen, (units,)) < rate
        votes = jnp.where(takes_part, indicator(norms_N, state.clip_norm), 0.0)
        noised = votes.sum() + jnp.float32(follow.count_stddev) * jax.random.normal(noise)
        return follow.update(state, noised, rate * units)

    state, seen = follow.init(), []
    for number in range(200):
        state = step(state, jax.random.fold_in(jax.random.key(1), number))
        seen.append(float(state.clip_norm))
    reached = float(np.exp(np.mean(np.log(seen[-60:]))))
    low, high = np.quantile(np.asarray(norms_N), [max(quantile - 0.06, 0), quantile + 0.06])
    assert low <= reached <= high
