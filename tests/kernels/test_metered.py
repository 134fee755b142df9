"""Sums of clipped outer products against float64, and metered products against plain ones."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fedjax_llm_kernels.low_rank import low_rank_matmul
from fedjax_llm_kernels.metered import Metered, NotAPlainFactor, clipped_outer_sum

# E, N, P, Q of the direct and of the Gram way.
SIZES = [(3, 4, 5, 2), (3, 2, 9, 7), (2, 1, 16, 8)]


def drawn(seed, *shapes):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cap", [0.0, 0.3, 5.0, math.inf, math.nan])
def test_sum_and_norms_are_the_float64_ones(size, cap):
    e, n, p, q = size
    x, u = drawn(0, (e, n, p), (e, n, q))
    total, norms = jax.jit(clipped_outer_sum)(x, u, jnp.full((e,), cap, jnp.float32))
    each = np.einsum("enp,enq->epq", np.asarray(x, np.float64), np.asarray(u, np.float64))
    exact = np.sqrt(np.square(each).sum((1, 2)))
    np.testing.assert_allclose(norms, exact, rtol=1e-4)
    scale = np.minimum(1.0, (cap if cap > 0 else 0.0) / exact)
    np.testing.assert_allclose(total, np.einsum("e,epq->pq", scale, each), rtol=1e-3, atol=1e-4)


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    st.floats(-2, 2, width=32),
)


@pytest.mark.parametrize("size", SIZES)
def test_a_reported_norm_is_never_below_the_true_one(size):
    e, n, p, q = size
    run = jax.jit(clipped_outer_sum)

    @given(st.lists(numbers, min_size=12, max_size=12), st.sampled_from([1.0, -1.0, 0.999]))
    @settings(deadline=None, max_examples=150)
    def search(values, repeat):
        x = np.resize(np.asarray(values[:6], np.float32), (e, n, p))
        u = np.resize(np.asarray(values[6:], np.float32), (e, n, q))
        if n > 1:  # positions that cancel, all but rounding
            x[:, 1], u[:, 1] = x[:, 0] * np.float32(repeat), u[:, 0]
        total, norms = run(jnp.asarray(x), jnp.asarray(u), jnp.ones(e))
        each = np.einsum("enp,enq->epq", x.astype(np.float64), u.astype(np.float64))
        tiny = (np.abs(x).max((1, 2)) < 1.2e-38) | (np.abs(u).max((1, 2)) < 1.2e-38)
        exact = np.where(tiny, 0.0, np.sqrt(np.square(each).sum((1, 2))))
        if n * (p + q) < p * q:  # directly, it is the norm of the float32 products
            assert (np.asarray(norms, np.float64) * (1 + 2**-14) >= exact).all()
        assert np.sqrt(np.square(np.asarray(total, np.float64)).sum()) <= e * (1 + 1e-6)

    search()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_example_that_is_not_finite_contributes_zeros(size, bad):
    e, n, p, q = size
    x, u = drawn(1, (e, n, p), (e, n, q))
    for cap in (1.0, math.inf):
        caps = jnp.full((e,), cap, jnp.float32)
        broken, norms = clipped_outer_sum(x.at[0, 0, 0].set(bad), u, caps)
        assert float(norms[0]) == math.inf
        expected, _ = clipped_outer_sum(x[1:], u[1:], caps[1:])
        np.testing.assert_allclose(broken, expected, rtol=1e-5, atol=1e-6)


def metered(x, a, b, cap):
    return low_rank_matmul(x, Metered(a, cap), Metered(b, cap), 0.5)


@pytest.mark.parametrize("shapes", [((3, 4, 6), 2), ((3, 1, 9), 5), ((3, 2, 2, 6), 2)])
def test_values_and_gradients_are_those_of_the_plain_product(shapes):
    lead, rank = shapes
    x, a, b, weight = drawn(2, lead, (lead[-1], rank), (rank, 7), (*lead[:-1], 7))
    caps = jnp.full((lead[0],), jnp.inf)

    def plain(x, a, b):
        return jnp.sum(low_rank_matmul(x, a, b, 0.5) * weight)

    def measured(x, a, b):
        return jnp.sum(jax.vmap(metered, in_axes=(0, None, None, 0))(x, a, b, caps) * weight)

    assert float(plain(x, a, b)) == pytest.approx(float(measured(x, a, b)), rel=1e-4)
    found = jax.grad(measured, (0, 1, 2))(x, a, b)
    for one, other in zip(jax.grad(plain, (0, 1, 2))(x, a, b), found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_cotangent_of_a_cap_is_the_norm_and_caps_hold():
    x, a, b = drawn(3, (4, 5, 6), (6, 2), (2, 7))

    def loss(caps, a):
        return jnp.sum(jax.vmap(metered, in_axes=(0, None, None, 0))(x, a, b, caps))

    free = jnp.full((4,), jnp.inf)
    norms, _ = jax.grad(loss, (0, 1))(free, a)
    each = jax.vmap(jax.grad(lambda a, b, x: jnp.sum(low_rank_matmul(x, a, b, 0.5)), (0, 1)),
                    in_axes=(None, None, 0))(a, b, x)  # fmt: skip
    exact = sum(np.sqrt(np.square(np.asarray(g)).sum((1, 2))) for g in each)  # a's cap and b's
    np.testing.assert_allclose(norms, exact, rtol=1e-4)
    only = jnp.zeros(4).at[2].set(0.25)
    da = jax.grad(loss, 1)(only, a)
    assert 0.2499 < float(jnp.linalg.norm(da)) <= 0.25


def test_an_inner_vmap_adds_positions_of_the_same_example():
    x, a, b = drawn(4, (3, 2, 4, 6), (6, 2), (2, 7))
    free = jnp.full((3,), jnp.inf)

    def loss(caps, inner):
        def example(x, cap):
            if inner:
                return jnp.sum(jax.vmap(lambda rows: metered(rows, a, b, cap))(x))
            return jnp.sum(metered(x, a, b, cap))

        return jnp.sum(jax.vmap(example)(x, caps))

    one, other = (jax.grad(loss)(free, inner) for inner in (True, False))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_is_not_a_product_is_refused_while_tracing():
    factor = Metered(jnp.ones((3, 2)), jnp.float32(1))
    assert (factor.shape, factor.ndim, factor.dtype) == ((3, 2), 2, jnp.float32)
    assert factor.astype(jnp.bfloat16) is factor
    for use in (jnp.sum, jnp.sin, lambda f: jnp.where(True, f, f), lambda f: jnp.ones((1, 3)) @ f):
        with pytest.raises((NotAPlainFactor, TypeError)):
            use(factor)
    x = jnp.ones((2, 1, 3))
    with pytest.raises(TypeError, match="must be the same for all examples"):
        jax.vmap(metered)(x, jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3)), jnp.ones(2))
