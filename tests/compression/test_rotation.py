"""The rotation against dense Hadamard matrices, and its tail bound against what happens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fedjax_llm.compression import Rotated, quantise
from fedjax_llm.compression.hadamard import rotate, transform, unrotate

SIZES = [1, 3, 100]


@pytest.mark.parametrize("size", [1, 8, 128])
def test_the_transform_is_the_dense_one(size: int) -> None:
    x_N = np.random.default_rng(0).normal(size=size).astype(np.float32)
    dense_N = hadamard(size) @ x_N.astype(np.float64) / math.sqrt(size)
    np.testing.assert_allclose(transform(jnp.asarray(x_N)), dense_N, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_orthonormal_and_has_no_padding(size: int) -> None:
    """Of every size; as a matrix, column by column."""
    columns_PxP = jax.vmap(rotate, in_axes=(None, 0))(jax.random.key(1), jnp.eye(size))
    assert columns_PxP.shape == (size, size)
    dense_PxP = np.asarray(columns_PxP, np.float64)
    np.testing.assert_allclose(dense_PxP @ dense_PxP.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_is_the_transpose(size: int) -> None:
    key, draw = jax.random.key(2), np.random.default_rng(size)
    x_P, y_P = (jnp.asarray(draw.normal(size=size), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(unrotate(key, rotate(key, x_P)), x_P, atol=2e-6)
    np.testing.assert_allclose(rotate(key, x_P) @ y_P, x_P @ unrotate(key, y_P), rtol=1e-4)


def test_nothing_rotates_to_nothing() -> None:
    assert rotate(jax.random.key(0), jnp.zeros(0)).shape == (0,)
    assert unrotate(jax.random.key(0), jnp.zeros(0)).shape == (0,)


def test_another_key_is_another_rotation_and_the_same_key_the_same_bytes() -> None:
    """Also fused with a product before it and a sum behind, which could be contracted."""
    x_P = jnp.asarray(np.random.default_rng(3).normal(size=300), jnp.float32)
    weight = jnp.float32(0.3)

    def alone(key: jax.Array) -> jax.Array:
        return rotate(key, x_P * weight)

    def fused(key: jax.Array, one: jax.Array) -> jax.Array:
        return rotate(key, x_P * weight) * jnp.float32(3.0) + one

    key = jax.random.key(4)
    y_P = np.asarray(rotate(key, jnp.asarray(np.asarray(x_P) * np.float32(0.3))))
    assert np.array_equal(jax.jit(alone)(key), y_P)
    expected_P = (y_P * np.float32(3.0)).astype(np.float64)
    found_P = np.asarray(jax.jit(fused)(key, jnp.float32(0.0)), np.float64)
    np.testing.assert_allclose(found_P, expected_P, rtol=1e-6)
    assert not np.allclose(rotate(jax.random.key(5), x_P), rotate(key, x_P))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 100]), st.sampled_from([0.5, 0.05]))
def test_the_tail_is_as_thin_as_stated(seed: int, spikes: int, tail: float) -> None:
    """Of 100 coordinates, 200 keys: no more pass the bound than 4 standard errors above the tail.

    Messages are those that spread worst: a few equal numbers, whose sums take few values.
    """
    draw = np.random.default_rng(seed)
    x_P = np.zeros(100, np.float32)
    x_P[draw.permutation(100)[:spikes]] = draw.choice([-1.0, 1.0], spikes) / math.sqrt(spikes)
    bound = Rotated().coordinate_bound(jax.ShapeDtypeStruct((100,), jnp.float32), 1.0, tail)
    keys = jax.random.split(jax.random.key(seed), 200)
    largest = np.abs(_rotated(keys, jnp.asarray(x_P))).max(axis=1)
    assert np.mean(largest > bound * (1 + 1e-5)) <= tail + 4 * math.sqrt(tail / 200)


_rotated = jax.jit(jax.vmap(rotate, in_axes=(0, None)))


@pytest.mark.parametrize("size", [2**16, 69_120, 2**20])
def test_the_bound_is_worth_having(size: int) -> None:
    """A single number of a long message is spread by more than four bits."""
    like = jax.ShapeDtypeStruct((size,), jnp.float32)
    block = 2 ** (size.bit_length() - 1)
    bound = Rotated().coordinate_bound(like, 3.0, 1e-6)
    assert bound == pytest.approx(3.0 * math.sqrt(2 * math.log(2e6 * size) / block))
    assert bound < 3.0 / 16


def test_four_bits_are_cut_where_they_lose_least() -> None:
    """A number in some hundreds is cut, and the mean of eight clients is twice as near."""
    size, clients, largest = 3000, 8, 7
    x_P = np.random.default_rng(7).standard_t(3, size).astype(np.float32)
    norm = float(np.linalg.norm(x_P))
    codec, like = Rotated(), jax.ShapeDtypeStruct((size,), jnp.float32)
    y_P = codec.encode((), jax.random.key(0), jnp.asarray(x_P))

    def error(bound: float) -> float:
        keys = jax.random.split(jax.random.key(1), clients)
        ints_KxP = jax.vmap(lambda key: quantise(key, y_P, bound / largest, largest))(keys)
        mean_P = np.asarray(ints_KxP, np.float64).mean(0) * (bound / largest)
        return float(np.linalg.norm(mean_P - np.asarray(y_P)) / norm)

    least = codec.least_error_bound(like, norm, 4, clients)
    assert 0 < np.mean(np.abs(y_P) > least) < 0.01
    assert 2 * error(least) < error(codec.coordinate_bound(like, norm, 1e-6))
