"""Ghost clipping on the decoder, its refusals, and what it does where the backward pass rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation.part import pick, put, where_rank
from fedjax_llm.errors import UserError
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Batch, load_model
from fedjax_llm.privacy import Joint, PerFactor, PerLayer, clipped_grad_sum
from fedjax_llm.privacy.clipping import ghost
from fedjax_llm_kernels.low_rank import low_rank_matmul

ROWS, LENGTH = 4, 12


@pytest.fixture(scope="module")
def model(stories260k):
    return load_model(stories260k)


def setting(model, sides, rank=2):
    adapter = init_adapter(model.config, LoraConfig(rank, 4.0, ("all-linear",)), jax.random.key(0))
    draw = np.random.default_rng(0)
    part = pick(adapter, sides)
    for name, arrays in pick(adapter, ("b",)).items():
        if "b" in sides:
            noise = 0.05 * draw.normal(size=arrays["b"].shape)
            part[name]["b"] = jnp.asarray(noise, jnp.float32)
    if "b" not in sides:  # A's gradient needs a B
        adapter = jax.tree.map(lambda x: x + jnp.float32(0.02), adapter)
    tokens = jnp.asarray(draw.integers(3, 512, (ROWS, LENGTH)), jnp.int32)
    lengths = jnp.array([LENGTH, 7, 1, LENGTH])[:, None]
    inside = jnp.arange(LENGTH)[None, :] < lengths
    return adapter, part, Batch(tokens, inside, inside.astype(jnp.int32))


def loss_of(model, adapter, remat=False, dtype=jnp.float32):
    def loss(part, row):
        return row_loss(model, model.base, put(adapter, part), row, dtype, remat)

    return loss


@pytest.fixture(scope="module")
def compiled(model):
    """Of the decoder, by trained sides, kind and method; each is compiled once."""

    @functools.cache
    def of(sides, kind, method):
        loss = loss_of(model, setting(model, sides)[0])
        return jax.jit(functools.partial(clipped_grad_sum, loss, clip_norm=kind, method=method))

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "kinds"),
    [
        (("a", "b"), [Joint(0.02), PerFactor(0.02, 0.04)]),
        pytest.param(("a", "b"), [PerLayer.even(0.02, 5)], marks=pytest.mark.drill),
        pytest.param(("b",), [Joint(100.0), PerFactor(0.04, 0.02)], marks=pytest.mark.drill),
        pytest.param(("a",), [PerLayer.even(100.0, 5)], marks=pytest.mark.drill),
    ],
)
def test_agrees_with_vmap_on_the_decoder(model, compiled, sides, kinds):
    _, part, rows = setting(model, sides)
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])
    for kind in kinds:
        (plain, stats), (other, others) = (
            compiled(sides, kind, method)(part, rows, weights) for method in ("vmap", "ghost")
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5), plain, other
        )
        assert (stats.clipped, stats.weight) == (others.clipped, others.weight)
        assert float(stats.loss) == pytest.approx(float(others.loss), rel=1e-5)


def test_recomputed_layers_and_reduced_precision(model, compiled):
    adapter, part, rows = setting(model, ("a", "b"))
    weights, kind = jnp.ones(ROWS), Joint(0.02)
    plain, _ = compiled(("a", "b"), kind, "vmap")(part, rows, weights)
    again, _ = jax.jit(
        lambda p: clipped_grad_sum(
            loss_of(model, adapter, remat=True), p, rows, weights, kind, "ghost"
        )
    )(part)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-7), plain, again)
    half, _ = jax.jit(
        lambda p: clipped_grad_sum(
            loss_of(model, adapter, dtype=jnp.bfloat16), p, rows, jnp.eye(ROWS)[0], kind, "ghost"
        )
    )(part)
    leaves = jax.tree.leaves(half)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    length = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves))
    assert 0.99 * 0.02 < length <= 0.02


def test_in_bfloat16_who_is_too_long_is_shortened_and_not_dropped(model):
    adapter, part, rows = setting(model, ("a", "b"))
    bound = 0.02
    summed = jax.jit(
        lambda weights_E: clipped_grad_sum(
            loss_of(model, adapter, dtype=jnp.bfloat16),
            part,
            rows,
            weights_E,
            Joint(bound),
            "ghost",
        )[0]
    )
    # The third row has no token to predict.
    for example in np.eye(ROWS, dtype=np.float32)[[0, 1, 3]]:
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(summed(example))]
        length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))
        assert (1 - 2.0**-5) * bound < length <= bound


def test_no_array_holds_all_per_example_gradients(model):
    adapter, part, rows = setting(model, ("a", "b"), rank=8)

    def largest(method):
        text = jax.jit(
            lambda p: clipped_grad_sum(
                loss_of(model, adapter), p, rows, jnp.ones(ROWS), Joint(1.0), method
            )
        ).lower(part)
        layers, inputs, rank = part["down_proj"]["a"].shape
        shapes = (f"{ROWS}x{layers}x{inputs}x{rank}xf32", f"{layers}x{ROWS}x{inputs}x{rank}xf32")
        return any(shape in text.as_text() for shape in shapes)

    assert largest("vmap") and not largest("ghost")


def test_what_is_no_plain_factor_is_refused(model):
    adapter, part, rows = setting(model, ("a", "b"))
    weights = jnp.ones(ROWS)
    run = functools.partial(
        clipped_grad_sum, examples=rows, weights_E=weights, clip_norm=1.0, method="ghost"
    )
    with pytest.raises(
        UserError, match=r"needs plain low-rank factors .*'r'.* use method \"vmap\""
    ):
        run(loss_of(model, adapter), {"q_proj": {"r": jnp.zeros((5, 2, 2))}})
    with pytest.raises(UserError, match="needs low-rank factors to train"):
        run(loss_of(model, adapter), {})

    def limited(part, row):
        return loss_of(model, adapter)(where_rank(part, before, jnp.int32(1)), row)

    before = part
    with pytest.raises(UserError, match=r"something else is computed .* use method \"vmap\""):
        run(limited, part)
    flat = {"p": {"a": jnp.ones((3, 1))}}

    def product(p, x):
        return low_rank_matmul(x[None], p["p"]["a"], jnp.ones((1, 3)), 1.0).sum()

    with pytest.raises(UserError, match=r"needs factors \[layers, inputs, outputs\]"):
        run(product, flat, examples=jnp.ones((ROWS, 3)), clip_norm=PerLayer((1.0,) * 3))


def test_a_factor_used_twice_is_bounded_by_the_triangle_inequality():
    """The two uses point the same way here, so that a sum of squares would be too little."""
    params = {"p": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}}

    def loss(p, x):
        once = low_rank_matmul(x[None], p["p"]["a"], p["p"]["b"], 1.0)
        return jnp.sum(once) + jnp.sum(low_rank_matmul(2 * x[None], p["p"]["a"], p["p"]["b"], 1.0))

    rows = jnp.array([[3.0, -1.0, 2.0], [0.1, 0.2, 0.3]])
    only = jnp.array([1.0, 0.0])
    total, _ = clipped_grad_sum(loss, params, rows, only, Joint(0.5), "ghost")
    length = np.sqrt(
        sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(total))
    )
    assert 0.49 < length <= 0.5


@pytest.mark.parametrize("times", [0, ghost._TIMES])
def test_a_second_pass_that_finds_an_example_too_long_shortens_it_alone(monkeypatch, times):
    """Pretends that the first pass saw half the true norms; without another try it is dropped."""
    params = {"p": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}}

    def loss(p, x):
        return low_rank_matmul(x[None], p["p"]["a"], p["p"]["b"], 1.0).sum()

    rows = jnp.array([[30.0, -10.0, 20.0], [0.01, 0.02, 0.03]])
    small, _ = clipped_grad_sum(loss, params, rows[1:], jnp.ones(1), Joint(0.5), "ghost")
    weights = ghost._weights
    monkeypatch.setattr(ghost, "_weights", lambda norm, *rest: weights(norm / 2, *rest))
    monkeypatch.setattr(ghost, "_TIMES", times)
    total, _ = clipped_grad_sum(loss, params, rows, jnp.ones(2), Joint(0.5), "ghost")
    large = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, total, small)
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(large)))
    if times:
        assert 0.98 * 0.5 < length <= 0.5 + 1e-6
    else:
        assert length < 1e-6


def test_cancellation_over_layers_of_wild_sizes_stays_within_the_bound():
    """Cotangents cancel from 10^12 down: what is added in the second pass is what counts."""
    draw = np.random.default_rng(6)
    params = {
        "p": {
            "a": jnp.asarray(draw.normal(size=(3, 4, 2)), jnp.float32),
            "b": jnp.asarray(draw.normal(size=(3, 2, 4)), jnp.float32),
        }
    }

    def loss(p, row):
        def layer(x, factors):
            x = x + low_rank_matmul(x, factors["a"], factors["b"], 1.0)
            huge = jnp.float32(1e12) * x
            return jnp.sin(x) + (
                huge - jnp.flip(jnp.flip(huge, 0), 0) * jnp.float32(1 + 2e-7)
            ), None

        return jnp.sum(jax.lax.scan(layer, row, p["p"])[0])

    rows = jnp.asarray(draw.normal(size=(8, 3, 4)), jnp.float32)
    run = jax.jit(lambda w: clipped_grad_sum(loss, params, rows, w, Joint(0.5), "ghost")[0])
    for one in range(8):
        leaves = jax.tree.leaves(run(jnp.zeros(8).at[one].set(1.0)))
        square = sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves)
        assert square <= 0.25
