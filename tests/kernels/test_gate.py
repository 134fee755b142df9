"""The gate and its derivative against differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels.gate import silu_gate


def exact(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_value_and_derivative_are_those_of_the_formula(dtype: type, tolerance: float) -> None:
    arrays = jax.random.normal(jax.random.key(0), (3, 7, 33)) * jnp.float32(4)
    gate, up, weight = (array.astype(dtype) for array in arrays)
    value, pull = jax.vjp(silu_gate, gate, up)
    g, u, w = (np.asarray(array, np.float64) for array in (gate, up, weight))
    step = 1e-5
    slope = (exact(g + step, u) - exact(g - step, u)) / (2 * step)
    want = [exact(g, u), w * slope, w * exact(g, np.ones_like(u))]
    for found, expected in zip([value, *pull(weight)], want, strict=True):
        assert found.dtype == dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(found, np.float64) / scale, expected / scale, atol=tolerance
        )


def test_far_from_zero_nothing_overflows() -> None:
    gate = jnp.array([-1e4, -90.0, 90.0, 1e4])
    value, pull = jax.vjp(silu_gate, gate, jnp.ones(4))
    np.testing.assert_allclose(value, [0.0, 0.0, 90.0, 1e4], atol=1e-30)
    np.testing.assert_allclose(pull(jnp.ones(4))[0], [0.0, 0.0, 1.0, 1.0], atol=1e-30)
