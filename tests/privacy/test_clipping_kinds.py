"""Every kind of clipping, by both methods: nobody contributes more than stated."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import (
    ClippedGradSum,
    Joint,
    PerFactor,
    PerLayer,
    clipped_grad_sum,
    poisson_clipped_grad_sum,
)
from fedjax_llm_kernels.low_rank import low_rank_matmul

E, LAYERS = 3, 2
KINDS = {
    "joint": Joint(0.5),
    "per-factor": PerFactor(0.3, 2.0),
    "per-layer": PerLayer((0.7, 0.1)),
}
# Positions, width and rank: outer products directly, and by Gram matrices.
SIZES = {"direct": (2, 3, 2), "gram": (1, 6, 4)}
MAX = float(np.finfo(np.float32).max)
floats32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
modest = st.floats(min_value=-4, max_value=4, width=32)
# Extremes alone make almost every example zeros; a mixture finds what is almost too long.
values = st.one_of(floats32, modest, st.sampled_from([0.0, MAX, 1e-45, 1e19, 1e-19, 2.0**-75]))


def loss_fn(params, row):
    """A product in each of two layers, the second of which sees what the first made."""

    def layer(x, factors):
        return x + low_rank_matmul(x, factors["p"]["a"], factors["p"]["b"], 0.5), None

    x, _ = jax.lax.scan(layer, row["x"], params)
    return jnp.sum(x * row["weight"])


def factors(size):
    _, width, rank = SIZES[size]
    draw = np.random.default_rng(0)
    shapes = {"a": (LAYERS, width, rank), "b": (LAYERS, rank, width)}
    return {"p": {k: jnp.asarray(draw.normal(size=s), jnp.float32) for k, s in shapes.items()}}


def rows_of(size, numbers):
    positions, width, _ = SIZES[size]
    arrays = np.resize(np.asarray(numbers, np.float32), (2, E, positions, width))
    return {"x": jnp.asarray(arrays[0]), "weight": jnp.asarray(arrays[1])}


RUN = {
    (kind, method): jax.jit(
        lambda params, rows, weights, kind=kind, method=method: clipped_grad_sum(
            loss_fn, params, rows, weights, KINDS[kind], method
        )[0]
    )
    for kind in KINDS
    for method in ("vmap", "ghost")
}


def square(leaves) -> Fraction:
    """The squared norm of float32 values, without rounding."""
    return sum((Fraction(float(x)) ** 2 for leaf in leaves for x in np.ravel(leaf)), Fraction(0))


def within(leaves, bound) -> bool:
    return square(leaves) <= Fraction(float(np.float32(bound))) ** 2


def check_contribution(kind, tree):
    """Every group within its bound, the whole within the sensitivity, as real numbers."""
    a, b = (np.asarray(tree["p"][side]) for side in "ab")
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert within([a, b], kind.sensitivity * (1 + 1e-7))
    if isinstance(kind, PerFactor):
        assert within([a], kind.clip_norm_a) and within([b], kind.clip_norm_b)
    if isinstance(kind, PerLayer):
        for layer, bound in enumerate(kind.clip_norms):
            assert within([a[layer], b[layer]], bound)
            assert all(within([leaf[layer]], bound / math.sqrt(2)) for leaf in (a, b))


@pytest.mark.parametrize("method", ["vmap", "ghost"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_example_contributes_more_than_stated(kind, size, method):
    params = factors(size)

    @given(st.lists(values, min_size=36, max_size=36))
    @example([MAX] * 36)
    @example([1e-45] * 36)
    @example([math.nan, 1.0] * 18)
    @example([math.inf, -MAX, 0.0] * 12)
    @example([1e19, 1e-19, 1.0, 3.0] * 9)
    @example([8.507060187143942e37, 0.0, 1.2e-38, 1.0] * 9)
    @settings(deadline=None, max_examples=60)
    def search(numbers):
        rows = rows_of(size, numbers)
        run = RUN[kind, method]
        everyone = run(params, rows, jnp.ones(E))
        for one in range(E):
            only = jnp.zeros(E).at[one].set(1.0)
            alone = run(params, rows, only)
            check_contribution(KINDS[kind], alone)
            without = run(params, rows, 1 - only)
            moved = math.sqrt(
                sum(
                    float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
                    for x, y in zip(
                        jax.tree.leaves(everyone), jax.tree.leaves(without), strict=True
                    )
                )
            )
            assert moved <= KINDS[kind].sensitivity * (1 + 8 * 2**-23)  # the additions round

    search()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_agree_and_bounds_are_attained(kind, size, scale):
    params = factors(size)
    rows = rows_of(size, np.random.default_rng(1).normal(size=36))
    rows["weight"] *= jnp.float32(scale)
    for weights in (jnp.ones(E), jnp.array([1.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 0.0])):
        plain, ghost = (RUN[kind, method](params, rows, weights) for method in ("vmap", "ghost"))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-3, atol=1e-3 * np.abs(x).max()),
            plain,
            ghost,
        )
        if scale >= 1e6 and float(weights.sum()) == 1:
            for tree in (plain, ghost):
                length = math.sqrt(square(jax.tree.leaves(tree)))
                assert 0.997 * KINDS[kind].sensitivity < length


def oracle(kind, tree):
    """float64; groups written out."""
    a, b = (np.asarray(tree["p"][side], np.float64) for side in "ab")

    def short(bound, *arrays):
        norm = math.sqrt(sum(float(np.sum(np.square(x))) for x in arrays))
        return [x * min(1.0, bound / norm) for x in arrays]

    if isinstance(kind, Joint):
        a, b = short(kind.clip_norm, a, b)
    elif isinstance(kind, PerFactor):
        (a,), (b,) = short(kind.clip_norm_a, a), short(kind.clip_norm_b, b)
    else:
        shares = [bound / math.sqrt(2) for bound in kind.clip_norms]
        a = np.stack([short(bound, x)[0] for bound, x in zip(shares, a, strict=True)])
        b = np.stack([short(bound, x)[0] for bound, x in zip(shares, b, strict=True)])
    return {"p": {"a": a, "b": b}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_float64_oracle(kind):
    params = factors("direct")
    rows = rows_of("direct", np.random.default_rng(2).normal(size=36))
    grads_E = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, rows)
    each = [oracle(KINDS[kind], jax.tree.map(lambda x, e=e: x[e], grads_E)) for e in range(E)]
    expected = jax.tree.map(lambda *x: sum(x), *each)
    for method in ("vmap", "ghost"):
        found = RUN[kind, method](params, rows, jnp.ones(E))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), found, expected
        )


def test_sensitivities():
    assert Joint(0.5).sensitivity == 0.5
    assert PerFactor(3.0, 4.0).sensitivity == 5.0
    assert PerLayer((1.0, 2.0, 2.0)).sensitivity == 3.0
    assert PerLayer.even(0.5, 7).sensitivity == pytest.approx(0.5)
    for kind in KINDS.values():
        assert ClippedGradSum(loss_fn, kind).sensitivity == kind.sensitivity
    assert float(Joint(jnp.float32(2)).sensitivity) == 2.0
    assert float(PerFactor(jnp.float32(3), 4.0).sensitivity) == 5.0


@pytest.mark.parametrize("method", ["vmap", "ghost"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_a_sample_as_over_examples(kind, method):
    params = factors("direct")
    rows = rows_of("direct", np.random.default_rng(3).normal(size=36))
    summed = ClippedGradSum(loss_fn, KINDS[kind], method)
    whole, stats = jax.jit(summed.over)(params, rows, jnp.ones(E))
    indices = jnp.array([2, 0, 1], jnp.int32)
    sample, sampled = jax.jit(summed.over_sample, static_argnums=4)(params, rows, indices, 3, 2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), whole, sample)
    assert (stats.clipped, stats.weight) == (sampled.clipped, sampled.weight)
    assert float(stats.loss) == pytest.approx(float(sampled.loss), rel=1e-5)


@pytest.mark.parametrize("method", ["vmap", "ghost"])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_clients_is_the_loop(kind, method):
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), factors("direct"))
    numbers = np.random.default_rng(4).normal(size=(2, 36))
    rows = jax.tree.map(lambda *x: jnp.stack(x), *(rows_of("direct", n) for n in numbers))
    indices, counts = jnp.arange(3, dtype=jnp.int32), jnp.array([3, 1], jnp.int32)

    def client(params, rows, count):
        return poisson_clipped_grad_sum(
            loss_fn, params, rows, indices, count, KINDS[kind], 2, method
        )

    together = jax.jit(jax.vmap(client))(params, rows, counts)
    for k in range(2):
        alone = jax.jit(client)(
            *(jax.tree.map(lambda x, k=k: x[k], t) for t in (params, rows)), counts[k]
        )
        jax.tree.map(
            lambda x, y, k=k: np.testing.assert_allclose(x[k], y, rtol=1e-5, atol=1e-6),
            together,
            alone,
        )


@pytest.mark.parametrize("method", ["vmap", "ghost"])
def test_a_broken_group_leaves_the_others(method):
    """Per layer and per factor, what is not finite zeroes its own group."""
    params = {"p": {"a": jnp.ones((2, 2, 1)), "b": jnp.ones((2, 1, 2))}}

    def loss(params, row):
        def layer(total, inputs):
            factors, x = inputs
            y = low_rank_matmul(x[None], factors["a"], factors["b"], 1.0)
            return total + jnp.sum(y), None

        return jax.lax.scan(layer, jnp.float32(0), (params["p"], row))[0]

    rows = jnp.array([[[math.nan, 1.0], [1.0, 1.0]]])
    total, stats = clipped_grad_sum(loss, params, rows, jnp.ones(1), PerLayer((1.0, 1.0)), method)
    assert not total["p"]["a"][0].any() and not total["p"]["b"][0].any()
    assert total["p"]["a"][1].all() and total["p"]["b"][1].all()
    assert (float(stats.clipped), float(stats.weight)) == (1.0, 1.0)
    rows = jnp.array([[[1e30, 1e30], [1.0, 1.0]]])  # x a overflows, which B's gradient needs
    big = {"p": {"a": 1e10 * params["p"]["a"], "b": params["p"]["b"]}}
    total, _ = clipped_grad_sum(loss, big, rows, jnp.ones(1), PerFactor(1.0, 1.0), method)
    assert total["p"]["a"].any() and not total["p"]["b"].any()


def test_kinds_may_be_traced_and_passed_through_jit():
    params, rows = factors("direct"), rows_of("direct", np.random.default_rng(5).normal(size=36))
    run = jax.jit(lambda kind: clipped_grad_sum(loss_fn, params, rows, jnp.ones(E), kind)[0])
    for kind in KINDS.values():
        fixed = clipped_grad_sum(loss_fn, params, rows, jnp.ones(E), kind)[0]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), run(kind), fixed
        )


def test_user_errors():
    params, rows = factors("direct"), rows_of("direct", [1.0])
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="clip_norm must be positive"):
            Joint(bad)
        with pytest.raises(UserError, match="clip_norm_b must be positive"):
            PerFactor(1.0, bad)
        with pytest.raises(UserError, match=r"clip_norms\[1\] must be positive"):
            PerLayer((1.0, bad))
    with pytest.raises(UserError, match="clip_norms is empty"):
        PerLayer(())
    with pytest.raises(UserError, match="layers must be at least 1, got 0"):
        PerLayer.even(1.0, 0)
    with pytest.raises(UserError, match="has 3 norms and a leaf of shape"):
        clipped_grad_sum(loss_fn, params, rows, jnp.ones(E), PerLayer((1.0,) * 3))
    with pytest.raises(UserError, match="no plain factor"):
        PerFactor(1.0, 1.0).clip({"r": jnp.ones(2)})
    with pytest.raises(UserError, match="method must be one of vmap, ghost; got gram"):
        clipped_grad_sum(loss_fn, params, rows, jnp.ones(E), 1.0, "gram")
    with pytest.raises(UserError, match="method must be one of"):
        ClippedGradSum(loss_fn, 1.0, "gram")
