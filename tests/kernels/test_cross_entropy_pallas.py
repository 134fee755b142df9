"""The Pallas forms of the cross entropy against a dense float64 oracle and the XLA form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels.cross_entropy import chunked_cross_entropy
from fedjax_llm_kernels.cross_entropy_pallas import gpu_pass, tpu_pass, tpu_tiles

FORMS = {"tpu": tpu_pass, "gpu": gpu_pass}


def problem(rows, width, vocabulary, seed=0, size=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(rows, width)) * size, dtype)
    return hidden, jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)


def oracle(hidden, unembed):
    """Log-sum-exp and softmax-weighted mean, dense and in float64."""
    hidden, unembed = np.asarray(hidden, np.float64), np.asarray(unembed, np.float64)
    logits = hidden @ unembed.T
    top = logits.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return lse, np.exp(logits - lse) @ unembed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (5, 7, 9), (70, 130, 300)])
def test_equals_the_dense_oracle_at_odd_sizes(form, rows, width, vocabulary):
    hidden, unembed = problem(rows, width, vocabulary)
    lse, mean = FORMS[form](hidden, unembed, with_gradient=True, interpret=True)
    expected_lse, expected_mean = oracle(hidden, unembed)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-4, atol=1e-5)
    (alone,) = FORMS[form](hidden, unembed, with_gradient=False, interpret=True)
    np.testing.assert_array_equal(alone, lse)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_accumulated_in_float32(form):
    hidden, unembed = problem(20, 32, 700, size=0.3, dtype=jnp.bfloat16)
    lse, mean = FORMS[form](hidden, unembed, with_gradient=True, interpret=True)
    assert lse.dtype == mean.dtype == jnp.float32
    expected_lse, expected_mean = oracle(hidden, unembed)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    # The weights are rounded to bfloat16 before their product with the unembedding.
    np.testing.assert_allclose(mean, expected_mean, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_do_not_overflow_and_a_bad_row_stays_alone(form):
    hidden, unembed = problem(4, 16, 300, size=1e3)
    # The largest logit in the last tile: every tile before is rescaled.
    unembed = unembed.at[-1].set(10 * unembed[-1])
    expected_lse, expected_mean = oracle(hidden, unembed)
    bad = hidden.at[1, 0].set(jnp.inf)
    lse, mean = FORMS[form](bad, unembed, with_gradient=True, interpret=True)
    good = [0, 2, 3]
    np.testing.assert_allclose(lse[jnp.asarray(good)], expected_lse[good], rtol=1e-5)
    np.testing.assert_allclose(mean[jnp.asarray(good)], expected_mean[good], rtol=1e-3, atol=1e-3)
    assert not np.isfinite(lse[1]) and not np.isfinite(mean[1]).any()


def test_the_function_gives_the_same_loss_and_gradient_also_under_vmap():
    hidden, unembed = problem(12, 24, 150, seed=3)
    hidden = hidden.reshape(2, 6, 24)
    targets = jnp.asarray([[0, 149, 3, 7, 7, -1], [1, 2, 150, 4, 5, 6]], jnp.int32)
    cotangents = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)

    def one(implementation):
        def weighted(hidden, targets):
            nll = chunked_cross_entropy(hidden, unembed, targets, 64, implementation)
            return jnp.sum(jnp.where(jnp.isnan(nll), 0.0, nll) * cotangents), nll

        return jax.vmap(jax.value_and_grad(weighted, has_aux=True))(hidden, targets)

    for xla, pallas in zip(*(jax.tree.leaves(one(how)) for how in ("xla", "pallas")), strict=True):
        np.testing.assert_allclose(pallas, xla, rtol=1e-5, atol=1e-5)


def test_a_derivative_of_the_unembedding_is_refused():
    hidden, unembed = problem(2, 3, 5)
    targets = jnp.zeros(2, jnp.int32)
    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(lambda u: chunked_cross_entropy(hidden, u, targets, 2, "pallas").sum())(unembed)


def test_an_unknown_implementation_is_an_error():
    hidden, unembed = problem(2, 3, 5)
    with pytest.raises(ValueError, match="got 'triton'"):
        chunked_cross_entropy(hidden, unembed, jnp.zeros(2, jnp.int32), 2, "triton")


def test_a_width_that_no_tile_can_hold_is_refused():
    with pytest.raises(ValueError, match="at width 100000"):
        tpu_tiles(128, 1000, 100_000, 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_a_tpu_without_a_matrix_of_logits(lowered, dtype):
    hidden = jax.ShapeDtypeStruct((1000, 576), dtype)
    unembed = jax.ShapeDtypeStruct((49152, 576), dtype)
    targets = jax.ShapeDtypeStruct((1000,), jnp.int32)

    def total(hidden, unembed, targets):
        return jnp.sum(chunked_cross_entropy(hidden, unembed, targets, 4096, "pallas"))

    assert lowered(jax.value_and_grad(total), "tpu", hidden, unembed, targets) == {
        "tpu_custom_call"
    }


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_a_gpu(lowered, dtype):
    hidden = jax.ShapeDtypeStruct((1000, 576), dtype)
    unembed = jax.ShapeDtypeStruct((49152, 576), dtype)
    targets = jax.ShapeDtypeStruct((1000,), jnp.int32)

    def total(hidden, unembed, targets):
        return jnp.sum(chunked_cross_entropy(hidden, unembed, targets, 4096, "pallas"))

    calls = lowered(jax.value_and_grad(total), "cuda", hidden, unembed, targets)
    assert "__gpu$xla.gpu.triton" in calls
