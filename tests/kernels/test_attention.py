"""Attention and its written-out derivative against the definition and JAX's own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels.attention import softmax_attention

SHAPES = [(2, 3, 5, 5, 4), (1, 1, 1, 7, 8), (2, 2, 12, 6, 3)]


def inputs(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> tuple[jax.Array, ...]:
    rows, heads, queries, keys, width = shape
    draw = np.random.default_rng(0)
    mask = draw.random((rows, queries, keys)) < 0.6
    mask[:, :, 0] = True
    arrays = [
        jnp.asarray(draw.normal(size=(rows, heads, length, width)), dtype)
        for length in (queries, keys, keys)
    ]
    return (*arrays, jnp.asarray(mask))


def definition(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """In float32; a query that sees nothing averages over all keys."""
    q, k, v = (array.astype(jnp.float32) for array in (q, k, v))
    scores = jnp.einsum("bhnk,bhsk->bhns", q, k) / jnp.float32(np.sqrt(q.shape[-1]))
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.float32(-1e30)), axis=-1)
    return jnp.einsum("bhns,bhsk->bhnk", weights, v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, error: float
) -> None:
    q, k, v, mask = inputs(shape, dtype)
    found, back = jax.vjp(lambda *qkv: softmax_attention(*qkv, mask), q, k, v)
    truth, true_back = jax.vjp(lambda *qkv: definition(*qkv, mask), q, k, v)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), truth, atol=error)
    cotangent = jax.random.normal(jax.random.key(1), truth.shape)
    cotangents = back(cotangent.astype(dtype)), true_back(cotangent)
    for own, true in zip(*cotangents, strict=True):
        assert own.dtype == dtype
        scale = float(jnp.max(jnp.abs(true.astype(jnp.float32))))
        np.testing.assert_allclose(
            own.astype(jnp.float32), true.astype(jnp.float32), atol=3 * error * max(scale, 1.0)
        )


def test_a_query_that_sees_nothing_averages_and_moves_neither_queries_nor_keys() -> None:
    q, k, v, mask = inputs(SHAPES[0], jnp.float32)
    mask = mask.at[0, 2].set(False)
    found, back = jax.vjp(lambda *qkv: softmax_attention(*qkv, mask), q, k, v)
    np.testing.assert_allclose(found[0, :, 2], v[0].mean(axis=1), rtol=1e-5)
    only = jnp.zeros_like(found).at[0, :, 2].set(1.0)
    dq, dk, dv = back(only)
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    np.testing.assert_allclose(dv[0], 1 / v.shape[2], rtol=1e-5)


def test_a_key_that_nobody_sees_changes_nothing() -> None:
    q, k, v, mask = inputs(SHAPES[0], jnp.float32)
    mask = mask.at[:, :, 4].set(False)
    other = softmax_attention(q, k.at[:, :, 4].set(1e6), v.at[:, :, 4].set(-1e6), mask)
    np.testing.assert_array_equal(other, softmax_attention(q, k, v, mask))


def test_one_mask_serves_all_rows_and_examples_are_mapped() -> None:
    """As in the gradients of examples: `vmap` of a derivative."""
    q, k, v, mask = inputs(SHAPES[0], jnp.float32)
    one = mask[:1]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(softmax_attention(q[None], k[None], v[None], one)))

    mapped = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for row in range(q.shape[0]):
        alone = jax.grad(loss, argnums=(0, 1, 2))(q[row], k[row], v[row])
        for own, both in zip(alone, mapped, strict=True):
            np.testing.assert_allclose(both[row], own, atol=1e-6)
