"""The Pallas kernels against the XLA programs, and what both lower to on other platforms."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm_kernels import ring as kernel
from fedjax_llm_kernels.bit_planes import pack, unpack, unpack_folded
from fedjax_llm_kernels.ring import Ring, choose_primes

SMALL = Ring(1024, choose_primes(1024, [27, 22]), 12, 3, 9, 1 << 10)
WORKING = Ring(4096, choose_primes(4096, [27, 26, 26, 26]), 19, 5, 9, 1 << 15)


def arguments(ring, elements):
    rng = np.random.default_rng(elements)
    a_hat = np.stack(
        [rng.integers(0, p, (elements, ring.size), dtype=np.uint32) for p in ring.primes], axis=1
    )
    values = rng.integers(-(1 << 10), 1 << 10, elements * ring.per_element).astype(np.int32)
    noise = rng.integers(0, 2**32, (3, elements, ring.size), dtype=np.uint32)
    seed = rng.integers(0, 2**32, (3, ring.size), dtype=np.uint32)
    _, secret_hat = kernel.prepare_secret(ring, jnp.asarray(seed))
    return jnp.asarray(values), jnp.asarray(a_hat), secret_hat, jnp.asarray(noise)


@pytest.mark.optimised
def test_pallas_is_xla_bit_for_bit():
    ring, elements = SMALL, 9  # a whole block of eight and one that is filled up
    values, a_hat, secret_hat, noise = arguments(ring, elements)
    payload = kernel.encrypt(ring, values, a_hat, secret_hat, noise)
    np.testing.assert_array_equal(
        payload, kernel.encrypt(ring, values, a_hat, secret_hat, noise, "pallas")
    )

    def start():
        full = np.random.default_rng(0).integers(0, 2**27, a_hat.shape, dtype=np.uint32)
        return jnp.asarray(full)

    total = kernel.add(ring, start(), payload)
    np.testing.assert_array_equal(total, kernel.add(ring, start(), payload, "pallas"))

    for words in (total, kernel.add(ring, jnp.zeros_like(total), payload)):
        xla, pallas = (
            kernel.unmask(ring, words, a_hat, secret_hat, jnp.int32(1), how)
            for how in ("xla", "pallas")
        )
        for one, other in zip(xla, pallas, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(pallas[0], values)


@pytest.mark.parametrize("bits", [13, 16, 23, 26, 27])
def test_planes_hold_every_residue_in_its_bits(bits):
    residues = np.random.default_rng(bits).integers(0, 1 << bits, 1024, dtype=np.uint32)
    residues[:2] = [0, (1 << bits) - 1]
    for rows in (32, 128):
        planes = pack(jnp.asarray(residues).reshape(rows, -1), bits)
        words = jnp.concatenate([plane.reshape(-1) for plane in planes])
        assert words.size * 4 == 1024 * bits // 8
        np.testing.assert_array_equal(unpack_folded(words, bits).reshape(-1), residues)
        by_rows = unpack(words.reshape(rows * bits // 32, -1), bits)
        np.testing.assert_array_equal(by_rows.reshape(-1), residues)


def programs(ring, elements, implementation):
    values, a_hat, secret_hat, noise = arguments(ring, elements)
    total = a_hat
    words = jnp.zeros(elements * ring.payload_bytes_per_element // 4, jnp.uint32)

    def encrypt(*x):
        return kernel.encrypt_words(ring, *x, implementation)

    def add(*x):
        return kernel.add_words(ring, *x, implementation)

    def unmask(*x):
        return kernel.unmask(ring, *x, implementation)

    yield encrypt, (values, a_hat, secret_hat, noise)
    yield add, (total, words)
    yield unmask, (total, a_hat, secret_hat, jnp.int32(1))


def exported(function, arrays, platforms):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return jax.export.export(jax.jit(function), platforms=platforms)(*shapes).mlir_module()


def wide_integers(module: str) -> list[str]:
    """64-bit element types; the body that spells out chlo.mulhi for others is not run here."""
    module = re.sub(r"func\.func private @chlo\.mulhi\.impl.*?\n  }", "", module, flags=re.DOTALL)
    module = re.sub(r"dense<[^>]*> : tensor<[0-9x]*i64>", "", module)  # attributes: shapes, padding
    return re.findall(r"tensor<[^>]*?u?i64>", module)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_xla_programs_have_no_64_bit_integers(platform):
    ring = SMALL
    functions = list(programs(ring, 2, "xla"))
    secret = jnp.zeros(ring.size, jnp.int32)
    functions.append((lambda s: kernel.transform_secret(ring, s), (secret,)))
    functions.append(
        (lambda w: kernel.prepare_secret(ring, w), (jnp.zeros((3, ring.size), jnp.uint32),))
    )
    functions.append((lambda k: kernel.uniform(ring, k, 0, 2), (jnp.zeros(8, jnp.uint32),)))
    functions.append((lambda t: kernel.reduce(ring, t), (jnp.zeros((2, 2, 1024), jnp.uint32),)))
    for function, arrays in functions:
        module = exported(function, arrays, [platform])
        assert wide_integers(module) == []
        assert platform == "cpu" or "chlo.mulhi" not in module


def test_the_pallas_kernels_lower_for_a_tpu():
    """To Mosaic's dialect: what the TPU compiler makes of it needs a TPU to be seen."""
    for function, arrays in programs(WORKING, 9, "pallas"):
        assert "tpu_custom_call" in exported(function, arrays, ["tpu"])
