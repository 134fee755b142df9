"""The low-rank product against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels.low_rank import low_rank_matmul, low_rank_matmuls
from fedjax_llm_kernels.metered import Metered


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def test_equals_the_dense_product_with_any_leading_axes():
    x, a, b = arrays((2, 3, 8), (8, 2), (2, 5))
    dense = np.asarray(x, np.float64) @ (
        1.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    )
    np.testing.assert_allclose(low_rank_matmul(x, a, b, 1.5), dense, rtol=1e-4, atol=1e-5)


def test_one_adapter_for_each_client_by_vmap_equals_a_loop():
    x, a, b = arrays((4, 3, 8), (4, 8, 2), (4, 2, 5))
    batched = jax.vmap(low_rank_matmul, in_axes=(0, 0, 0, None))(x, a, b, 0.5)
    for client in range(4):
        one = low_rank_matmul(x[client], a[client], b[client], 0.5)
        np.testing.assert_allclose(batched[client], one, rtol=1e-5, atol=1e-6)


@pytest.mark.optimised
def test_the_dense_matrix_is_never_formed():
    x, a, b = arrays((1, 512), (512, 2), (2, 512))
    flops = jax.jit(low_rank_matmul).lower(x, a, b, 1.0).compile().cost_analysis()["flops"]
    assert flops < 512 * 512


def test_gradients_are_those_of_the_dense_product():
    x, a, b = arrays((3, 8), (8, 2), (2, 5))
    low = jax.grad(lambda *args: jnp.sum(jnp.sin(low_rank_matmul(*args, 0.5))), (0, 1, 2))(x, a, b)
    dense = jax.grad(lambda x, a, b: jnp.sum(jnp.sin(x @ (a @ b) * 0.5)), (0, 1, 2))(x, a, b)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), low, dense)


def test_keeps_bfloat16():
    x, a, b = (array.astype(jnp.bfloat16) for array in arrays((3, 8), (8, 2), (2, 5)))
    assert low_rank_matmul(x, a, b, 2.0).dtype == jnp.bfloat16


def several():
    """Activations [2, 5, 6], three pairs of unlike ranks and widths, a cotangent of each."""
    keys = iter(jax.random.split(jax.random.key(2), 12))
    x = jax.random.normal(next(keys), (2, 5, 6))
    pairs = [
        (
            jax.random.normal(next(keys), (6, rank)),
            jax.random.normal(next(keys), (rank, width)),
        )
        for rank, width in ((3, 4), (1, 7), (2, 4))
    ]
    weights = [jax.random.normal(next(keys), (2, 5, b.shape[1])) for _, b in pairs]
    return x, pairs, weights


def test_products_that_share_their_input_equal_single_ones() -> None:
    x, pairs, weights = several()

    def together(x, pairs, scale):
        found = low_rank_matmuls(x, pairs, scale)
        return sum(jnp.sum(y * w) for y, w in zip(found, weights, strict=True))

    def dense(x, pairs, scale):
        return sum(
            jnp.sum(scale * (x @ a @ b) * w) for (a, b), w in zip(pairs, weights, strict=True)
        )

    arguments = (x, pairs, jnp.float32(0.75))
    found = jax.value_and_grad(together, (0, 1, 2))(*arguments)
    expected = jax.value_and_grad(dense, (0, 1, 2))(*arguments)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5),
        found,
        expected,
    )


def test_rows_together_and_one_by_one_have_the_same_derivatives() -> None:
    x, pairs, weights = several()

    def loss(pairs, x, weights):
        found = low_rank_matmuls(x, pairs, 0.5)
        return sum(jnp.sum(y * w) for y, w in zip(found, weights, strict=True))

    def by_row(pairs):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0, 0))(pairs, x, weights))

    together, apart = jax.grad(loss)(pairs, x, weights), jax.grad(by_row)(pairs)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5),
        together,
        apart,
    )


def test_a_metered_pair_leaves_the_others_plain() -> None:
    x, pairs, weights = several()

    def loss(pairs, caps, wrap):
        def one(x, cap, weights):
            (a, b), *rest = pairs
            given = [rest[0], (wrap(a, cap), b), *rest[1:]]
            found = low_rank_matmuls(x, given, 0.5)
            order = [weights[1], weights[0], *weights[2:]]
            return sum(jnp.sum(y * w) for y, w in zip(found, order, strict=True))

        return jnp.sum(jax.vmap(one)(x, caps, weights))

    caps = jnp.full(2, jnp.inf)
    metered = jax.grad(loss)(pairs, caps, Metered)
    plain = jax.grad(loss)(pairs, caps, lambda a, cap: a)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5),
        metered,
        plain,
    )


def test_no_pairs_are_no_products() -> None:
    assert low_rank_matmuls(jnp.ones((2, 3)), [], 1.0) == []
