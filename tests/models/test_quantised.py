"""Quantised kernels against bounds derived from their grids, and against the float model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.lora import LoraConfig, add_dense, delta, init_adapter, merge
from fedjax_llm.models import (
    Batch,
    DecoderConfig,
    apply,
    base_bytes,
    base_shapes,
    dequantised_base,
    init_base,
    load_model,
    loss,
    quantised_base,
    save_model,
)
from fedjax_llm.models.quantised import frozen_matmul
from fedjax_llm.models.quantised_base import KINDS
from fedjax_llm.models.quantised_nf4 import BLOCK, GROUP, TABLE, Scales8

CONFIG = DecoderConfig(61, 24, 40, 3, 4, 2, 6, tie_embeddings=True)
DEEP = DecoderConfig(32, 64, 128, 12, 4, 4, 16, tie_embeddings=True)
# Two roundings of a product and one of a quotient, in units of the largest weight.
ROUNDING = 4 * np.finfo(np.float32).eps

# What another case of the same test covers by the same code, and takes long to compile.
drilled = partial(pytest.param, marks=pytest.mark.drill)
# Few shapes, each of which is compiled: around one block, around two, and one weight.
kernels = st.tuples(
    st.sampled_from([(1, 1), (63, 3), (129, 2)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-30, 1.0]),
)


def drawn(drawn_kernel) -> np.ndarray:
    """A kernel [2, D, F] of very different magnitudes, with zeros."""
    shape, seed, size = drawn_kernel
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(2, *shape)) * size * 10.0 ** rng.integers(-3, 3)
    kernel[rng.random(kernel.shape) < 0.1] = 0
    return kernel.astype(np.float32)


@jax.jit
def floats_of(kernel) -> jax.Array:
    return kernel.dequantised()


def blocks(kernel: np.ndarray, size: int):
    """Slices of `size` inputs of one output of one layer."""
    for layer, column in np.ndindex(kernel.shape[0], kernel.shape[2]):
        for first in range(0, kernel.shape[1], size):
            yield layer, slice(first, first + size), column


@settings(max_examples=12, deadline=None)
@given(kernels)
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(kernel):
    kernel = drawn(kernel)
    found = np.asarray(floats_of(KINDS["int8"](kernel)))
    for at in blocks(kernel, kernel.shape[1]):
        top = np.abs(kernel[at]).max()
        assert np.abs(found[at] - kernel[at]).max() <= top * (1 / 254 + ROUNDING)
        # What is largest, and every zero, are kept to the bit.
        exact = (np.abs(kernel[at]) == top) | (kernel[at] == 0)
        np.testing.assert_array_equal(found[at][exact], kernel[at][exact])


@settings(max_examples=12, deadline=None)
@given(kernels)
def test_nf4_takes_the_nearest_value_of_its_block(kernel):
    kernel = drawn(kernel)
    found = np.asarray(floats_of(KINDS["nf4"](kernel)))
    assert found.shape == kernel.shape
    for at in blocks(kernel, BLOCK):
        top = np.abs(kernel[at]).max()
        nearest = np.abs(TABLE.astype(np.float64) * top - kernel[at][:, None]).min(axis=1)
        error = np.abs(found[at].astype(np.float64) - kernel[at])
        np.testing.assert_array_less(error, nearest + top * ROUNDING + 1e-44)
        assert error.max() <= top * (np.diff(TABLE).max() / 2 + ROUNDING)


@settings(max_examples=12, deadline=None)
@given(st.just(2), st.sampled_from([1, GROUP, GROUP + 5]), st.integers(0, 2**32 - 1))
def test_eight_bit_scales_are_off_by_half_a_step_of_their_group_at_most(rows, outputs, seed):
    scales = np.random.default_rng(seed).gamma(1.0, size=(rows, outputs)).astype(np.float32)
    found = np.asarray(floats_of(jax.jit(Scales8.of)(scales)))
    for row in range(rows):
        for first in range(0, outputs, GROUP):
            at = row, slice(first, first + GROUP)
            least, top = scales[at].min(), scales[at].max()
            bound = (top - least) / 510 + top * ROUNDING
            assert np.abs(found[at] - scales[at]).max() <= bound
            assert found[at].min() >= least


@settings(max_examples=12, deadline=None)
@given(kernels)
def test_double_quantisation_adds_no_more_than_the_error_of_the_scale(kernel):
    kernel = drawn(kernel)
    single, double = KINDS["nf4"](kernel), KINDS["nf4-double"](kernel)
    assert isinstance(double.scales_BxF, Scales8)
    used = np.asarray(floats_of(double.scales_BxF))
    exact, found = np.asarray(single.scales_BxF), np.asarray(floats_of(double))
    half = np.diff(TABLE).max() / 2
    for layer, rows, column in blocks(kernel, BLOCK):
        at, block = (layer, rows, column), (layer, rows.start // BLOCK, column)
        short = max(0.0, exact[block] - used[block])
        bound = half * used[block] + short + exact[block] * ROUNDING
        assert np.abs(found[at] - kernel[at]).max() <= bound


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@settings(max_examples=12, deadline=None)
@given(kernels)
def test_what_can_be_represented_comes_back_to_the_bit(kind, kernel):
    once = KINDS[kind](drawn(kernel))
    jax.tree.map(np.testing.assert_array_equal, KINDS[kind](floats_of(once)), once)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("int8", 8 + 32 / 128),
        ("nf4", 4 + 32 / BLOCK),
        ("nf4-double", 4 + (8 + 64 / GROUP) / BLOCK),
    ],
)
def test_bytes_are_those_of_the_codes_and_their_scales(kind, bits):
    kernel = KINDS[kind](jnp.ones((128, 512)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) == 128 * 512 * bits / 8


@pytest.mark.parametrize("size", [0.0, 1e-40])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_zeros_and_of_subnormal_weights_are_zeros(kind, size):
    kernel = jnp.full((70, 3), size)
    np.testing.assert_array_equal(KINDS[kind](kernel).dequantised(), jnp.zeros((70, 3)))


def adapter_of(config: DecoderConfig):
    adapter = init_adapter(config, LoraConfig(2, 6.0, ("all-linear",)), jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf + jnp.float32(0.03), adapter)


def batch_of(config: DecoderConfig, rows: int = 2, length: int = 7) -> Batch:
    shape = (rows, length)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size, jnp.int32)
    return Batch(tokens, jnp.ones(shape, bool), jnp.ones(shape, jnp.int32))


def total(config: DecoderConfig, base, adapter, batch: Batch, **options) -> jax.Array:
    return jnp.sum(loss(config, base, adapter, batch, **options)[0])


@pytest.mark.optimised
@pytest.mark.parametrize(("kind", "remat"), [drilled("int8", False), ("nf4-double", True)])
def test_loss_and_gradient_are_those_of_the_float_model_to_the_bit(kind, remat):
    base = quantised_base(init_base(CONFIG, jax.random.key(0)), kind)
    step = jax.jit(jax.value_and_grad(partial(total, CONFIG, remat=remat), argnums=1))
    arguments = adapter_of(CONFIG), batch_of(CONFIG)
    floats = jax.jit(dequantised_base)(base)
    jax.tree.map(np.testing.assert_array_equal, step(base, *arguments), step(floats, *arguments))


@pytest.mark.drill
def test_bfloat16_activations_round_the_weights_once():
    base = quantised_base(init_base(CONFIG, jax.random.key(0)), "nf4")
    rounded = dequantised_base(base, jnp.bfloat16)
    step = jax.jit(jax.value_and_grad(partial(total, CONFIG, dtype=jnp.bfloat16), argnums=1))
    arguments = adapter_of(CONFIG), batch_of(CONFIG)
    found, want = step(base, *arguments), step(rounded, *arguments)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def float_bytes_made(jaxpr) -> int:
    """The largest floating-point array that is made anywhere in a program, in bytes."""
    most = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            most = max(most, float_bytes_made(inner) if hasattr(inner, "eqns") else 0)
        for out in equation.outvars:
            if jnp.issubdtype(out.aval.dtype, jnp.floating):
                most = max(most, out.aval.size * out.aval.dtype.itemsize)
    return most


@pytest.mark.parametrize(
    ("kind", "remat"), [drilled("int8", False), ("nf4", False), drilled("nf4-double", True)]
)
def test_one_layer_at_a_time_is_in_floats(kind, remat):
    base = quantised_base(init_base(DEEP, jax.random.key(0)), kind)
    adapter = init_adapter(DEEP, LoraConfig(1, 1.0, ("q_proj",)), jax.random.key(1))
    step = jax.grad(partial(total, DEEP, remat=remat), argnums=1)
    made = jax.make_jaxpr(step)(base, adapter, batch_of(DEEP, rows=1, length=8)).jaxpr
    # One layer of the largest kernel, or an activation of all layers; the smallest kernel of all
    # layers would be larger.
    assert 64 * 128 * 4 <= float_bytes_made(made) < 12 * 64 * 64 * 4


@pytest.mark.optimised
def test_the_compiled_step_keeps_no_float_layers_either():
    base = quantised_base(init_base(DEEP, jax.random.key(0)), "nf4")
    adapter = init_adapter(DEEP, LoraConfig(1, 1.0, ("q_proj",)), jax.random.key(1))
    step = jax.jit(jax.grad(partial(total, DEEP), argnums=1))
    compiled = step.lower(base, adapter, batch_of(DEEP, rows=1, length=8)).compile()
    floats = sum(leaf.size * 4 for leaf in jax.tree.leaves(base_shapes(DEEP)["layers"]))
    assert compiled.memory_analysis().temp_size_in_bytes < floats / 2


def test_a_derivative_of_the_weights_is_refused_not_zero():
    kernel = jnp.ones((3, 4))
    with pytest.raises(TypeError, match="no derivative with respect to a kernel"):
        jax.grad(lambda k: jnp.sum(frozen_matmul(jnp.ones((2, 3), jnp.bfloat16), k)))(kernel)
    got = jax.grad(lambda k: jnp.sum(frozen_matmul(jnp.ones((2, 3)), k)))(kernel)
    np.testing.assert_array_equal(got, 2 * jnp.ones((3, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_a_quantised_base_is_kept_apart(kind):
    """Twice a small change: rounding the sum would lose it."""
    base = quantised_base(init_base(CONFIG, jax.random.key(0)), kind)
    small = jax.tree.map(lambda leaf: leaf * jnp.float32(1e-3), adapter_of(CONFIG))
    twice = add_dense(merge(base, small), delta(small))
    for name, added in delta(small).items():
        kernel = base["layers"][name]["kernel"]
        found = twice["layers"][name]["kernel"]
        np.testing.assert_array_equal(found.dequantised(), kernel.dequantised() + (added + added))
        assert found.shape == kernel.shape == added.shape
    if kind == "nf4":
        tokens = batch_of(CONFIG).tokens_BxT
        logits = jax.jit(apply, static_argnums=0)
        np.testing.assert_allclose(
            logits(CONFIG, twice, None, tokens),
            logits(CONFIG, dequantised_base(twice), None, tokens),
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", [drilled("int8"), drilled("nf4"), "nf4-double"])
def test_a_model_is_quantised_as_it_is_read(kind, stories260k, tmp_path):
    model = load_model(stories260k)
    read = load_model(stories260k, quantised=kind).base
    jax.tree.map(np.testing.assert_array_equal, read, quantised_base(model.base, kind))
    assert base_bytes(read) < base_bytes(model.base) / 2
    with pytest.raises(UserError, match="the base has quantised kernels"):
        save_model(tmp_path, model.config, read, model.tokenizer)
    floats = dequantised_base(read)
    save_model(tmp_path, model.config, floats, model.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path).base, floats)


@pytest.mark.parametrize(
    ("kind", "nats"), [("int8", 0.003), ("nf4", 0.2), drilled("nf4-double", 0.2)]
)
def test_a_trained_model_loses_little(kind, nats, stories260k, shared):
    """Nats a token of held-out stories; what was measured is in experiments/benchmarks."""
    model = load_model(stories260k)
    text = (shared / "data" / "lm_text" / "tinystories_valid_4stories.txt").read_text("utf-8")
    ids = np.array(model.tokenizer.encode(text), np.int32)
    rows = jnp.asarray(ids[: len(ids) // 128 * 128].reshape(-1, 128))
    batch = Batch(rows, jnp.ones(rows.shape, bool), jnp.ones(rows.shape, jnp.int32))
    nll = jax.jit(lambda base: total(model.config, base, None, batch) / (rows.size - len(rows)))
    lost = float(nll(quantised_base(model.base, kind)) - nll(model.base))
    assert abs(lost) < nats
