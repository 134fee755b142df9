"""The products of many adapters: each form against a float64 oracle, client by client."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels import many_adapters_pallas as pallas
from fedjax_llm_kernels.many_adapters import many_adapter_matmul

ODD = [(1, 5, 7, 1, 1), (3, 70, 96, 17, 130)]


def problem(clients, positions, width, rank, outputs, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(positions), 4)
    shapes = [
        (clients, positions, width),
        (clients, width, rank),
        (clients, rank, outputs),
        (clients, positions, outputs),
    ]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def oracle(x, a, b, scale, dy):
    """Product and its four cotangents in float64."""
    x, a, b, dy = (np.asarray(array, np.float64) for array in (x, a, b, dy))
    y = scale * x @ a @ b
    u = dy @ b.swapaxes(1, 2)
    down = x @ a
    dx = scale * u @ a.swapaxes(1, 2)
    da = scale * x.swapaxes(1, 2) @ u
    return y, (dx, da, scale * down.swapaxes(1, 2) @ dy, (u * down).sum())


def gpu(x, a, b, scale, dy):
    (y,) = pallas.gpu_forward(x, a, (scale * b,), interpret=True)
    dx, da, (db,) = pallas.gpu_backward(x, a, (scale * b,), (dy,), interpret=True)
    return y, (dx, da, scale * db)


def by_function(implementation):
    def run(x, a, b, scale, dy):
        product = partial(many_adapter_matmul, implementation=implementation)
        y, pull = jax.vjp(product, x, a, b, jnp.asarray(scale, jnp.float32))
        return y, pull(dy)

    return run


FORMS = {
    "xla": jax.jit(by_function("xla")),
    "tpu": jax.jit(by_function("pallas")),
    "gpu": jax.jit(gpu),
}


def close(got, expected, relative):
    """To within a part of the largest value: sums of terms of either sign cancel."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, atol=relative * max(np.abs(expected).max(), 1e-6)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", ODD)
def test_equals_the_oracle_at_odd_sizes(form, sizes):
    x, a, b, dy = problem(*sizes)
    y, gradients = FORMS[form](x, a, b, 0.7, dy)
    expected_y, expected = oracle(x, a, b, np.float32(0.7), dy)
    close(y, expected_y, 1e-5)
    # The kernel itself has no scale, which is a factor of b, nor its cotangent.
    for got, wanted in zip(gradients, expected, strict=form != "gpu"):
        close(got, wanted, 3e-5)


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_products_of_the_same_activations_are_those_of_each_alone(form):
    """In one call; what each adds to the cotangents of the activations and of a is added up."""
    forward, backward = (getattr(pallas, f"{form}_{way}") for way in ("forward", "backward"))
    (x, a, *first), (_, _, *second) = problem(2, 70, 96, 17, 130), problem(2, 70, 96, 17, 33)

    def both(pairs):
        b, dy = zip(*pairs, strict=True)
        return forward(x, a, b, interpret=True), backward(x, a, b, dy, interpret=True)

    y, (dx, da, db) = jax.jit(both)([first, second])
    dxs, das = 0.0, 0.0
    for place, (b, dy) in enumerate([first, second]):
        expected_y, expected = oracle(x, a, b, 1.0, dy)
        close(y[place], expected_y, 1e-5)
        close(db[place], expected[2], 3e-5)
        dxs, das = dxs + expected[0], das + expected[1]
    close(dx, dxs, 3e-5)
    close(da, das, 3e-5)


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_bfloat16_is_accumulated_in_float32(form):
    x, a, b, dy = problem(2, 100, 64, 8, 96, jnp.bfloat16)
    y, gradients = FORMS[form](x, a, b, 0.5, dy)
    assert y.dtype == gradients[0].dtype == jnp.bfloat16
    expected_y, expected = oracle(x, a, b, 0.5, dy)
    close(y, expected_y, 1e-2)
    # The scale's cotangent is a sum of terms of either sign, and cancels.
    for got, wanted in zip(gradients[:3], expected[:3], strict=True):
        close(got, wanted, 1e-2)


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_a_client_that_is_not_finite_stays_alone(form):
    x, a, b, dy = problem(3, 40, 24, 4, 24)
    good = FORMS[form](x, a, b, 1.0, dy)
    bad = FORMS[form](x.at[1, 3, 3].set(jnp.nan), a, b, 1.0, dy)
    for whole, broken in zip((good[0], *good[1][:3]), (bad[0], *bad[1][:3]), strict=True):
        for client in (0, 2):
            np.testing.assert_array_equal(whole[client], broken[client])
    assert np.isnan(bad[0][1, 3]).all() and np.isfinite(bad[0][1, 4]).all()


def test_no_clients_or_positions_give_empty_products():
    x, a, b, _ = problem(2, 3, 4, 2, 5)
    assert many_adapter_matmul(x[:, :0], a, b, 1.0, "pallas").shape == (2, 0, 5)
    assert many_adapter_matmul(x[:0], a[:0], b[:0], 1.0, "pallas").shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a, b: (x, a[:1], b), "every client one adapter"),
        (lambda x, a, b: (x, a, b[:, :1]), "every client one adapter"),
        (lambda x, a, b: (x[0], a, b), "three axes"),
        (lambda x, a, b: (x.astype(jnp.bfloat16), a, b), "one dtype"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        many_adapter_matmul(*change(*problem(2, 3, 4, 2, 5)[:3]), 1.0)


def test_outputs_that_no_block_can_hold_are_refused():
    with pytest.raises(ValueError, match="100000 outputs"):
        pallas.tpu_positions(128, 1000, 8, [100_000], 4, False)
    x, a, b, _ = (jnp.ones(shape) for shape in [(1, 1, 1), (1, 1, 1), (1, 1, 400_000), ()])
    with pytest.raises(ValueError, match=r'400000 outputs .* use implementation "xla"'):
        many_adapter_matmul(x, a, b, 1.0, "pallas")


def both_ways(x, a, b, dy):
    y, pull = jax.vjp(lambda *args: many_adapter_matmul(*args, 0.5, "pallas"), x, a, b)
    return y, pull(dy)


SHAPES = [(8, 500, 576, 8, 1536), (4, 2000, 4096, 16, 4096)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_a_tpu(lowered, sizes, dtype):
    shapes = jax.eval_shape(lambda: problem(*sizes, dtype))
    assert lowered(both_ways, "tpu", *shapes) == {"tpu_custom_call"}


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_a_gpu(lowered, sizes, dtype):
    shapes = jax.eval_shape(lambda: problem(*sizes, dtype))
    assert "__gpu$xla.gpu.triton" in lowered(both_ways, "cuda", *shapes)
