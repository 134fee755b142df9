"""The fused rounding and packing: bit for bit what the two steps of `compression` give."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import packing, rounding
from fedjax_llm_kernels import quantise_pack_pallas
from fedjax_llm_kernels.quantise_pack import quantise_pack


def gpu(y, random, step, bits):
    inverse = 1 / jnp.asarray(step, jnp.float32)
    return quantise_pack_pallas.gpu_pack(y, random, inverse, bits=bits, interpret=True)


FORMS = {
    "xla": jax.jit(partial(quantise_pack, implementation="xla"), static_argnums=3),
    "tpu": jax.jit(partial(quantise_pack, implementation="pallas"), static_argnums=3),
    "gpu": jax.jit(gpu, static_argnums=3),
}
each_form = pytest.mark.parametrize("form", FORMS)


def payload(words, count, bits):
    """The bytes of the words, after a check that zeros fill the last of them."""
    stream = np.asarray(words).astype(">u4").tobytes()
    size = packing.payload_bytes(count, bits)
    assert not any(stream[size:]) and len(stream) == 4 * bits * -(-count // 32)
    return stream[:size]


@each_form
@pytest.mark.parametrize(("bits", "count"), [(3, 129), (8, 75)])
def test_equals_rounding_and_then_packing(form, bits, count):
    key, step = jax.random.key(bits), np.float32(1.5 / rounding.largest_integer(bits))
    y = jax.random.normal(key, (count,))
    ints = rounding.quantise(key, y, step, rounding.largest_integer(bits))
    words, invalid = FORMS[form](y, jax.random.bits(key, (count,), jnp.uint32), step, bits)
    assert payload(words, count, bits) == packing.pack(np.asarray(ints), bits)
    assert invalid == 0


@pytest.mark.drill
@each_form
@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("count", [1, 70_001])
def test_equals_rounding_and_then_packing_at_every_width(form, bits, count):
    test_equals_rounding_and_then_packing(form, bits, count)


def exact(y, random, step, bits):
    """One number in rational arithmetic; `step` a power of two, so that y / step is exact."""
    largest = 2 ** (bits - 1) - 1
    size = min(abs(Fraction(float(y))) / Fraction(step), Fraction(largest))
    low = int(size)
    number = low + (int(random) < int((size - low) * 2**32))
    return -number if y < 0 else number


@each_form
def test_the_random_bits_decide_as_rational_arithmetic_has_it(form):
    bits, step = 8, 0.25
    tiny = float(np.finfo(np.float32).tiny)
    y = [0.0, -0.0, 0.25, -0.25, 0.3, -0.3, 0.125, 31.7, -31.74, 1e9, -1e9, tiny, 2.0**-34]
    y += [np.nextafter(np.float32(0.25), np.float32(0)), 2.0**-33 * 3]
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    y_M = jnp.asarray(np.repeat(np.float32(y), len(edges)))
    random_M = jnp.asarray(np.tile(np.uint32(edges), len(y)))
    words, invalid = FORMS[form](y_M, random_M, step, bits)
    found = packing.unpack(payload(words, y_M.size, bits), y_M.size, bits)
    expected = [exact(v, r, step, bits) for v, r in zip(y_M, random_M, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert invalid == 0


@each_form
def test_what_is_not_finite_is_counted_and_packed_as_zero(form):
    y = jnp.zeros(129).at[jnp.asarray([0, 77, 128])].set(jnp.float32([np.nan, np.inf, -np.inf]))
    random = jax.random.bits(jax.random.key(0), (129,), jnp.uint32)
    words, invalid = FORMS[form](y, random, 0.1, 3)
    assert invalid == 3 and invalid.dtype == jnp.int32
    np.testing.assert_array_equal(packing.unpack(payload(words, 129, 3), 129, 3), np.zeros(129))


def test_nothing_is_no_words():
    words, invalid = quantise_pack(jnp.zeros(0), jnp.zeros(0, jnp.uint32), 1.0, 8, "pallas")
    assert words.shape == (0,) and invalid == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, r"bits must be in \[2, 16\], got 1"),
        ({"bits": 17}, "got 17"),
        ({"y_M": jnp.zeros((2, 2))}, "y must be float32"),
        ({"y_M": jnp.zeros(4, jnp.bfloat16)}, "y must be float32"),
        ({"random_M": jnp.zeros(3, jnp.uint32)}, "one word for each number"),
        ({"random_M": jnp.zeros(4, jnp.int32)}, "one word for each number"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = {"y_M": jnp.zeros(4), "random_M": jnp.zeros(4, jnp.uint32), "step": 1.0, "bits": 8}
    with pytest.raises(ValueError, match=message):
        quantise_pack(**{**good, **change})


def packed(bits):
    return lambda y, random: quantise_pack(y, random, 0.5, bits, "pallas")


SHAPES = (
    jax.ShapeDtypeStruct((100_001,), jnp.float32),
    jax.ShapeDtypeStruct((100_001,), jnp.uint32),
)


@pytest.mark.parametrize("bits", [3, 8])
def test_lowers_for_a_tpu(lowered, bits):
    assert lowered(packed(bits), "tpu", *SHAPES) == {"tpu_custom_call"}


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("bits", [3, 8])
def test_lowers_for_a_gpu(lowered, bits):
    assert "__gpu$xla.gpu.triton" in lowered(packed(bits), "cuda", *SHAPES)
