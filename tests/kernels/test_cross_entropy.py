"""Chunked cross entropy against a dense float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm_kernels.cross_entropy import chunked_cross_entropy


def problem(rows: int, width: int, vocabulary: int, seed: int, size: float = 1.0):
    rng = np.random.default_rng(seed)
    hidden = (rng.normal(size=(rows, width)) * size).astype(np.float32)
    unembed = rng.normal(size=(vocabulary, width)).astype(np.float32)
    return hidden, unembed, rng.integers(0, vocabulary, rows).astype(np.int32)


def oracle(hidden, unembed, targets):
    """Loss and its gradient with respect to hidden, dense and in float64."""
    hidden, unembed = hidden.astype(np.float64), unembed.astype(np.float64)
    logits = hidden @ unembed.T
    top = logits.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    nll = lse[:, 0] - logits[np.arange(len(targets)), targets]
    return nll, np.exp(logits - lse) @ unembed - unembed[targets]


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_value_and_gradient_equal_the_dense_oracle(rows, width, vocabulary, chunk, seed):
    hidden, unembed, targets = problem(rows, width, vocabulary, seed)
    weights = np.random.default_rng(seed).normal(size=rows).astype(np.float32)
    nll, gradient = oracle(hidden, unembed, targets)

    def weighted(hidden):
        values = chunked_cross_entropy(hidden, unembed, targets, chunk)
        return jnp.sum(values * weights), values

    (_, values), got = jax.value_and_grad(weighted, has_aux=True)(jnp.asarray(hidden))
    np.testing.assert_allclose(values, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, gradient * weights[:, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        chunked_cross_entropy(hidden, unembed, targets, chunk), nll, rtol=1e-5, atol=1e-5
    )


def test_large_logits_do_not_overflow():
    hidden, unembed, targets = problem(4, 16, 100, seed=0, size=1e3)
    nll, gradient = oracle(hidden, unembed, targets)
    values = chunked_cross_entropy(hidden, unembed, targets, 7)
    got = jax.grad(lambda h: jnp.sum(chunked_cross_entropy(h, unembed, targets, 7)))(hidden)
    np.testing.assert_allclose(values, nll, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(got, gradient, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_accumulated_in_float32():
    hidden, unembed, targets = problem(6, 32, 300, seed=2)
    hidden16, unembed16 = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembed, jnp.bfloat16)
    nll, _ = oracle(np.asarray(hidden16, np.float32), np.asarray(unembed16, np.float32), targets)
    values = chunked_cross_entropy(hidden16, unembed16, targets, 64)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, nll, rtol=1e-4)
    got = jax.grad(lambda h: jnp.sum(chunked_cross_entropy(h, unembed16, targets, 64)))(hidden16)
    assert got.dtype == jnp.bfloat16


@pytest.mark.optimised
def test_logits_of_all_words_are_never_held():
    rows, width, vocabulary, chunk = 64, 16, 8192, 256
    hidden, unembed, targets = problem(rows, width, vocabulary, seed=3)
    total = jax.value_and_grad(lambda h: jnp.sum(chunked_cross_entropy(h, unembed, targets, chunk)))
    compiled = jax.jit(total).lower(jnp.asarray(hidden)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocabulary * 4


def test_vmap_equals_loop_for_value_and_gradient():
    hidden, unembed, targets = problem(12, 8, 50, seed=4)
    one = jax.value_and_grad(lambda h, t: jnp.sum(chunked_cross_entropy(h, unembed, t, 16)))
    hidden, targets = jnp.asarray(hidden).reshape(4, 3, 8), jnp.asarray(targets).reshape(4, 3)
    values, gradients = jax.vmap(one)(hidden, targets)
    for row in range(4):
        value, gradient = one(hidden[row], targets[row])
        np.testing.assert_allclose(values[row], value, rtol=1e-6)
        np.testing.assert_allclose(gradients[row], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_derivative_of_the_unembedding_is_refused_not_zero(wrap):
    hidden, unembed, targets = problem(2, 3, 5, seed=5)
    total = wrap(lambda u: jnp.sum(chunked_cross_entropy(hidden, u, targets, 2)))
    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(total)(jnp.asarray(unembed))


@pytest.mark.parametrize("target", [-1, 5, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row_alone(target):
    hidden, unembed, _ = problem(2, 3, 5, seed=6)
    targets = jnp.asarray([target, 2], jnp.int32)
    values = chunked_cross_entropy(hidden, unembed, targets, 2)
    assert np.isnan(values[0]) and np.isfinite(values[1])


def test_a_row_that_is_not_finite_stays_in_its_row():
    hidden, unembed, targets = problem(3, 3, 5, seed=7)
    hidden[1, 0] = np.inf
    total = jax.grad(lambda h: jnp.sum(chunked_cross_entropy(h, unembed, targets, 2)))
    finite = np.isfinite(total(jnp.asarray(hidden))).all(axis=1)
    assert finite.tolist() == [True, False, True]


def test_a_chunk_below_one_is_an_error():
    hidden, unembed, targets = problem(2, 3, 5, seed=8)
    with pytest.raises(ValueError, match="got 0"):
        chunked_cross_entropy(hidden, unembed, targets, 0)
