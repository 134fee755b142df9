"""Factors of low-rank products against numpy's dense float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.lora import algebra


def orthonormal_columns(q: Any) -> float:
    """The largest distance from it."""
    gram = np.swapaxes(np.asarray(q, np.float64), -1, -2) @ np.asarray(q, np.float64)
    return float(np.max(np.abs(gram - np.eye(gram.shape[-1]))))


def outside(q: Any, a: np.ndarray) -> np.ndarray:
    """What of each column of a the basis does not span, of the column's length."""
    q = np.asarray(q, np.float64)
    a = a.astype(np.float64)
    left = np.linalg.norm(a - q @ (np.swapaxes(q, -1, -2) @ a), axis=-2)
    return left / np.maximum(np.linalg.norm(a, axis=-2), 1e-300)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_basis_is_orthonormal_and_spans_whatever_the_condition(
    condition: float, size: float
) -> None:
    draw = np.random.default_rng(0)
    u, _ = np.linalg.qr(draw.normal(size=(3, 300, 12)))
    v, _ = np.linalg.qr(draw.normal(size=(3, 12, 12)))
    a = (u * (size * np.geomspace(1, 1 / condition, 12))) @ v
    q = algebra.orthonormal(jnp.asarray(a, jnp.float32))
    assert orthonormal_columns(q) < 2e-6
    assert np.max(outside(q, a.astype(np.float32))) < 2e-6


@pytest.mark.parametrize("lengths", [1e-10, 1e10])
def test_a_basis_spans_columns_of_any_length(lengths: float) -> None:
    """Each to its own accuracy, the shortest too."""
    draw = np.random.default_rng(1)
    a = (draw.normal(size=(200, 8)) * np.geomspace(1, lengths, 8)).astype(np.float32)
    q = algebra.orthonormal(jnp.asarray(a))
    assert orthonormal_columns(q) < 2e-6
    assert np.max(outside(q, a)) < 2e-6


@pytest.mark.parametrize("kind", ["zero", "one column zero", "equal columns", "wide"])
def test_a_basis_of_columns_that_depend_on_each_other(kind: str) -> None:
    draw = np.random.default_rng(2)
    a = draw.normal(size=(50, 6)).astype(np.float32)
    if kind == "zero":
        a[:] = 0
    elif kind == "one column zero":
        a[:, 2] = 0
    elif kind == "equal columns":
        a[:, 4] = a[:, 1]
    else:
        a = a[:4]
    q = algebra.orthonormal(jnp.asarray(a))
    assert q.shape == (a.shape[0], min(a.shape))
    assert orthonormal_columns(q) < 2e-6
    assert np.max(outside(q, a)) < 2e-6


def test_a_basis_of_layers_of_which_one_is_zero() -> None:
    a = np.random.default_rng(3).normal(size=(3, 40, 5)).astype(np.float32)
    a[1] = 0
    q = algebra.orthonormal(jnp.asarray(a))
    assert orthonormal_columns(q) < 2e-6 and np.max(outside(q, a)) < 2e-6


@settings(max_examples=40, deadline=None)
@given(
    inner=st.integers(1, 16),
    span=st.floats(0, 12),
    rows=st.sampled_from(["any", "orthogonal", "parallel", "rounded", "one zero", "all zero"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_left_axes_are_those_of_the_singular_value_decomposition(
    inner: int, span: float, rows: str, seed: int
) -> None:
    """Values to float32 of the largest; axes orthonormal, and what they leave in order."""
    draw = np.random.default_rng(seed)
    b = draw.normal(size=(inner, 60)) * np.geomspace(1, 10.0**-span, inner)[:, None]
    if rows == "any":
        turn, _ = np.linalg.qr(draw.normal(size=(inner, inner)))
        b = turn @ b
    elif rows == "parallel":
        b = b[:1] * draw.normal(size=(inner, 1))
    elif rows == "rounded":
        # What fixed point leaves of rows that ought to be zero: a few steps, in few places.
        b[inner // 2 :, 3:] = 0
        b[inner // 2 :] = np.round(b[inner // 2 :]) * 1e-6 * np.abs(b).max()
    elif rows == "one zero":
        b[draw.integers(inner)] = 0
    elif rows == "all zero":
        b[:] = 0
    b = b.astype(np.float32)
    u, s = algebra.left_axes(jnp.asarray(b))
    truth = np.linalg.svd(b.astype(np.float64), compute_uv=False)
    truth = np.concatenate([truth, np.zeros(inner - len(truth))])
    largest = truth[0]
    assert orthonormal_columns(u) < 5e-6
    np.testing.assert_allclose(s, truth, atol=1e-5 * largest)
    # Each direction's part of b is as long as its singular value says.
    lengths = np.linalg.norm(np.asarray(u, np.float64).T @ b, axis=1)
    np.testing.assert_allclose(lengths, truth, atol=1e-5 * largest)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)),
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_truncated_is_the_best_approximation(
    sizes: tuple[int, int, int], rank: int, seed: int
) -> None:
    """Whatever the shapes: wider than high, inner size above both, rank above all."""
    inputs, outputs, inner = sizes
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(inputs, inner)).astype(np.float32)
    b = draw.normal(size=(inner, outputs)).astype(np.float32)
    left, right = algebra.truncated(jnp.asarray(a), jnp.asarray(b), rank)
    assert left.shape == (inputs, rank) and right.shape == (rank, outputs)
    u, s, vt = np.linalg.svd(a.astype(np.float64) @ b, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(np.asarray(left) @ np.asarray(right), best, atol=1e-4 * (1 + s[0]))


@settings(max_examples=25, deadline=None)
@given(inner=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_the_norm_of_a_sum_of_products(inner: int, seed: int) -> None:
    """On either side of the size at which the sum itself is formed; exact for differences."""
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(2, 12, inner)).astype(np.float32)
    b = draw.normal(size=(2, inner, 10)).astype(np.float32)
    near = (b * (1 + 1e-3 * draw.normal(size=b.shape))).astype(np.float32)
    found = float(algebra.frobenius_of_sum([(jnp.asarray(a), jnp.asarray(b)), (-a, near)]))
    truth = np.linalg.norm(a.astype(np.float64) @ (b.astype(np.float64) - near))
    assert found == pytest.approx(truth, rel=5e-3)
