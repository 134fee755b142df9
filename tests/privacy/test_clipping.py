"""Sensitivity by adversarial search, float64 oracles, dynamic samples, nesting in vmap."""

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
    clip,
    clipped_grad_sum,
    poisson_clipped_grad_sum,
)

jit_clip = jax.jit(clip)
jit_clipped_grad_sum = jax.jit(clipped_grad_sum, static_argnums=0)
floats32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
MAX = float(np.finfo(np.float32).max)


def exact_square(tree) -> Fraction:
    """The squared norm of float32 values, without rounding."""
    return sum(
        (Fraction(float(x)) ** 2 for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)),
        Fraction(0),
    )


@given(
    st.lists(floats32, min_size=6, max_size=6),
    st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
)
@example([MAX] * 6, 1.0)
@example([1e-45] * 6, 1.0)
@example([1.2e-38] * 6, 2.0**-100)
@example([MAX, 1e-45, 0.0, -0.0, 1.0, -MAX], 2.0**100)
@example([8.507060187143942e37, 0.0, 0.0, 0.0, 0.0, 0.0], 1.0)  # reciprocal is denormal
@example([1.7014117331926443e38, 0.0, 0.0, 0.0, 1.0, 0.0], 1.0)
@example([1.1754943508222875e-38, 0.0, 0.0, 0.0, 0.0, 0.0], 2.0**-100)
@example([0.6, 0.8, 0.0, 0.0, 0.0, 0.0], 1.0)
@example([math.nan] + [1.0] * 5, 1.0)
@example([-math.inf] + [1.0] * 5, 1.0)
@settings(deadline=None, max_examples=300)
def test_norm_never_exceeds_clip_norm(values, clip_norm):
    tree = {"a": jnp.array(values[:4], jnp.float32).reshape(2, 2), "b": jnp.array(values[4:])}
    out, _ = jit_clip(tree, jnp.float32(clip_norm))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))
    assert exact_square(out) <= Fraction(float(np.float32(clip_norm))) ** 2


@pytest.mark.parametrize("size", [1, 127, 128, 129, 40_000, 3_000_000])
@pytest.mark.parametrize("value", [1.0, 0.1, 3e38, 1e-37])
def test_long_trees_stay_within_clip_norm(size, value):
    # Equal terms are the worst case of a float32 running sum: it stops growing at 2^24.
    tree = {"x": jnp.full((size,), value, jnp.float32)}
    out, norm = jit_clip(tree, jnp.float32(0.5))
    length = math.sqrt(size * float(out["x"][0]) ** 2)
    assert bool((out["x"] == out["x"][0]).all())
    assert 0.5 * (1 - 2e-4) < length <= 0.5 or value * math.sqrt(size) < 0.5
    expected = float(np.float32(value)) * math.sqrt(size)
    np.testing.assert_allclose(float(norm), expected if expected < MAX else math.inf, rtol=1e-5)


def test_running_sum_is_not_merged_by_the_compiler():
    x = jnp.full((2**25 + 2**20,), 1.0, jnp.float32)
    _, norm = jit_clip(x, jnp.float32(1))
    assert float(norm) == pytest.approx(math.sqrt(x.size), rel=1e-6)


def test_every_exponent_of_float32():
    values = np.exp2(np.arange(-149.0, 128.0)).astype(np.float32)
    for scale in (1.0, 1.9999):
        rows = {"a": jnp.array(values * np.float32(scale))[:, None], "b": jnp.zeros((277, 3))}
        for bound in (2.0**-90, 1.0, 2.0**90):
            out, _ = jax.jit(jax.vmap(clip, in_axes=(0, None)))(rows, jnp.float32(bound))
            length = np.abs(np.asarray(out["a"], np.float64)).ravel()
            assert (length <= bound).all()
            wanted = np.minimum(np.asarray(rows["a"], np.float64).ravel(), bound)
            seen = wanted > 1e-37
            np.testing.assert_allclose(length[seen], wanted[seen], rtol=2e-4)
    assert float(jit_clip(jnp.array(values), 1.0)[1]) == pytest.approx(
        2.0**127 * math.sqrt(4 / 3), rel=1e-5
    )


def test_edge_cases():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros((0, 2))}
    out, norm = clip(tree, 10.0)
    assert float(norm) == pytest.approx(5.0, rel=1e-6)
    np.testing.assert_array_equal(out["a"], tree["a"])  # untouched, bit for bit
    out, _ = clip(tree, math.inf)
    np.testing.assert_array_equal(out["a"], tree["a"])
    for bound in (0.0, -1.0, math.nan):
        out, _ = clip(tree, bound)
        np.testing.assert_array_equal(out["a"], np.zeros(2))
    for bad in (math.nan, math.inf, -math.inf):
        out, norm = clip({"a": jnp.array([1.0, 2.0]), "b": jnp.array([bad])}, 10.0)
        assert float(norm) == math.inf
        assert all(not leaf.any() for leaf in jax.tree.leaves(out))
    out, norm = clip({"a": jnp.zeros(3)}, 1.0)
    assert float(norm) == 0 and not out["a"].any()
    for empty in ({}, {"a": jnp.zeros((0, 3))}):
        out, norm = clip(empty, 1.0)
        assert jax.tree.structure(out) == jax.tree.structure(empty) and float(norm) == 0


def test_reduced_precision_is_clipped_in_float32():
    out, norm = clip({"a": jnp.full((1000,), 0.1, jnp.bfloat16)}, 1.0)
    assert out["a"].dtype == jnp.float32
    assert float(norm) == pytest.approx(math.sqrt(1000) * float(jnp.bfloat16(0.1)), rel=1e-5)
    assert exact_square(out) <= 1


def loss_fn(params, row):
    return jnp.square(row["x"] @ params["w"] + params["b"] - row["y"]).sum()


def problem(seed=0, n=23, d=4):
    rng = np.random.default_rng(seed)
    data = {
        "x": jnp.array(rng.normal(size=(n, d)), jnp.float32),
        "y": jnp.array(rng.normal(size=(n, 2)), jnp.float32),
    }
    params = {
        "w": jnp.array(rng.normal(size=(d, 2)), jnp.float32),
        "b": jnp.array(rng.normal(size=(2,)), jnp.float32),
    }
    return params, data


def oracle(params, data, indices, clip_norm):
    """Plain float64 loop over the examples with the gradient written out."""
    w, b = (np.asarray(params[k], np.float64) for k in ("w", "b"))
    total, losses, clipped = {"w": np.zeros_like(w), "b": np.zeros_like(b)}, [], 0
    for i in indices:
        x, y = (np.asarray(data[k][i], np.float64) for k in ("x", "y"))
        error = x @ w + b - y
        grad = {"w": 2 * np.outer(x, error), "b": 2 * error}
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        clipped += norm > clip_norm
        losses.append((error**2).sum())
        for k in total:
            total[k] += grad[k] * min(1.0, clip_norm / norm)
    return total, (np.mean(losses) if losses else 0.0), clipped


@pytest.mark.parametrize("clip_norm", [0.1, 3.0, 1e6])
def test_clipped_sum_is_the_float64_oracle(clip_norm):
    params, data = problem()
    weights = jnp.arange(23) % 3 != 0
    total, stats = jit_clipped_grad_sum(loss_fn, params, data, weights, clip_norm)
    expected, loss, clipped = oracle(params, data, np.flatnonzero(weights), clip_norm)
    for k in expected:
        np.testing.assert_allclose(total[k], expected[k], rtol=2e-4, atol=2e-4 * clip_norm)
    assert float(stats.loss) == pytest.approx(loss, rel=1e-5)
    assert int(stats.clipped) == clipped and int(stats.weight) == int(weights.sum())


linear_loss = lambda params, g: (params * g).sum()  # noqa: E731  the gradient is the example


@given(
    st.lists(st.lists(floats32, min_size=3, max_size=3), min_size=5, max_size=5),
    st.integers(0, 4),
    st.sampled_from([0.01, 1.0, 100.0]),
)
@example([[0.0] * 3, [0.0] * 3, [0.0, 0.0, 8.507060187143942e37], [0.0] * 3, [0.0] * 3], 2, 0.01)
@example([[math.nan] * 3, [MAX] * 3, [1e-45] * 3, [1.0] * 3, [0.0] * 3], 0, 1.0)
@settings(deadline=None, max_examples=200)
def test_removing_one_example_moves_the_sum_by_at_most_the_sensitivity(rows, left_out, clip_norm):
    grads = jnp.array(rows, jnp.float32)
    params = jnp.zeros(3)
    summed = ClippedGradSum(linear_loss, clip_norm)
    run = jit_clipped_grad_sum
    with_all, _ = run(linear_loss, params, grads, jnp.ones(5), clip_norm)
    without, _ = run(linear_loss, params, grads, jnp.ones(5).at[left_out].set(0.0), clip_norm)
    moved = np.linalg.norm(np.asarray(with_all, np.float64) - np.asarray(without, np.float64))
    assert moved <= summed.sensitivity * (1 + 4 * 2**-23)  # the additions round
    assert np.isfinite(moved)


def test_padding_and_broken_examples_contribute_nothing():
    grads = jnp.array([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0], [math.inf, 2.0]])
    total, stats = clipped_grad_sum(linear_loss, jnp.zeros(2), grads, jnp.array([1, 1, 0, 0]), 10.0)
    np.testing.assert_array_equal(total, [1.0, 0.0])
    assert (float(stats.clipped), float(stats.weight)) == (1.0, 2.0)
    total, stats = clipped_grad_sum(linear_loss, jnp.zeros(2), grads, jnp.zeros(4), 10.0)
    assert not total.any() and stats == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 22, 23, 99])
def test_dynamic_sample_is_the_oracle(count):
    params, data = problem()
    order = np.random.default_rng(1).permutation(23)
    run = jax.jit(poisson_clipped_grad_sum, static_argnums=(0, 6))
    total, stats = run(loss_fn, params, data, jnp.array(order, jnp.int32), count, 3.0, 4)
    taken = order[:count]
    expected, loss, clipped = oracle(params, data, taken, 3.0)
    for k in expected:
        np.testing.assert_allclose(total[k], expected[k], rtol=2e-4, atol=1e-4)
    assert float(stats.loss) == pytest.approx(loss, rel=1e-5)
    assert int(stats.clipped) == clipped and int(stats.weight) == len(taken)


def test_dynamic_sample_repeats_bit_for_bit_and_ignores_what_is_not_selected():
    params, data = problem()
    run = jax.jit(poisson_clipped_grad_sum, static_argnums=(0, 6))
    indices = jnp.arange(23, dtype=jnp.int32)
    first, _ = run(loss_fn, params, data, indices, 7, 3.0, 4)
    poisoned = jax.tree.map(lambda x: x.at[7:].set(jnp.nan), data)
    again, _ = run(loss_fn, params, poisoned, indices.at[7:].set(0), 7, 3.0, 4)
    for k in first:
        np.testing.assert_array_equal(first[k], again[k])


def test_vmap_over_clients_is_the_loop():
    problems = [problem(seed) for seed in range(3)]
    params, data = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *part)
        for part in zip(*problems, strict=True)
    )
    counts = jnp.array([0, 5, 23], jnp.int32)
    indices = jnp.arange(23, dtype=jnp.int32)
    weights = jnp.ones(23)

    def sample(p, d, c):
        return poisson_clipped_grad_sum(loss_fn, p, d, indices, c, 3.0, 4)

    def whole(p, d, c):
        return clipped_grad_sum(loss_fn, p, d, weights, 3.0)

    for f in (sample, whole):
        batched = jax.jit(jax.vmap(f))(params, data, counts)
        for k, (p, d) in enumerate(problems):
            alone = jax.jit(f)(p, d, counts[k])
            jax.tree.map(
                lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-5),
                batched,
                alone,
            )


def test_over_sample_and_over_agree():
    params, data = problem()
    summed = ClippedGradSum(loss_fn, 3.0)
    whole, _ = summed.over(params, data, jnp.ones(23))
    sample, _ = summed.over_sample(params, data, jnp.arange(23, dtype=jnp.int32), 23, 5)
    for k in whole:
        np.testing.assert_allclose(whole[k], sample[k], rtol=1e-5, atol=1e-5)


def test_user_errors():
    params, data = problem()
    with pytest.raises(UserError, match="microbatch must be at least 1, got 0"):
        poisson_clipped_grad_sum(loss_fn, params, data, jnp.arange(23), 3, 1.0, 0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="clip_norm"):
            ClippedGradSum(loss_fn, bad)


@pytest.mark.parametrize("bound", [2e-38, 1e-35, 1e-30, 2.0**-96, 1e-20])
def test_many_denormal_elements_beside_a_normal_one_stay_within_the_bound(bound: float) -> None:
    """Flushed where the norm is measured, and perhaps not where they are returned."""
    tiny = np.finfo(np.float32).tiny
    tree = np.full(1_000_000, np.nextafter(tiny, np.float32(0)), np.float32)
    tree[0] = tiny
    clipped, _ = clip({"w": jnp.asarray(tree)}, jnp.float32(bound))
    assert np.sqrt(np.square(np.asarray(clipped["w"], np.float64)).sum()) <= bound
