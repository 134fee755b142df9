"""Noise has the standard deviation, shape and independence that the plan counts on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_llm.privacy import gaussian_noise_like

TREE = {"a": jnp.zeros((300, 200), jnp.bfloat16), "b": {"c": jnp.zeros(40_000), "d": jnp.zeros(())}}


@pytest.mark.parametrize("stddev", [0.01, 1.0, 250.0])
def test_variance_is_in_its_chi_square_interval(stddev):
    noise = gaussian_noise_like(jax.random.key(11), TREE, stddev)
    assert jax.tree.structure(noise) == jax.tree.structure(TREE)
    for leaf, like in zip(jax.tree.leaves(noise), jax.tree.leaves(TREE), strict=True):
        assert leaf.shape == like.shape and leaf.dtype == jnp.float32
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noise)]).astype(np.float64)
    low, high = stats.chi2.interval(0.999, flat.size)
    assert low < (flat**2).sum() / stddev**2 < high
    assert abs(flat.mean()) < 4 * stddev / np.sqrt(flat.size)
    assert stats.kstest(flat / stddev, "norm").pvalue > 1e-3


def test_leaves_and_keys_are_independent():
    twins = {"a": jnp.zeros(50_000), "b": jnp.zeros(50_000)}
    one = gaussian_noise_like(jax.random.key(0), twins, 1.0)
    two = gaussian_noise_like(jax.random.key(1), twins, 1.0)
    for x, y in ((one["a"], one["b"]), (one["a"], two["a"])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(50_000)
    again = gaussian_noise_like(jax.random.key(0), twins, 1.0)
    np.testing.assert_array_equal(one["a"], again["a"])


def test_zero_and_empty():
    noise = gaussian_noise_like(jax.random.key(0), TREE, 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(noise))
    assert gaussian_noise_like(jax.random.key(0), {}, 1.0) == {}
