"""The mark `optimised`: a test and the processes that it starts compile as users do."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler


@jax.jit
def doubled(x: jax.Array) -> jax.Array:
    return x + x


def asked_of_xla() -> int:
    """The level of optimisation of what is compiled now; runs a program of all these tests."""
    # Otherwise a test would run what another compiled in its own way.
    assert doubled._cache_size() == 0
    doubled(jnp.float32(1.0))
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    return options.executable_build_options.debug_options.xla_backend_optimization_level


@pytest.mark.skipif(
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0", reason="all tests are optimised"
)
def test_without_the_mark_little_is_optimised() -> None:
    assert asked_of_xla() == 0
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"


@pytest.mark.optimised
def test_with_the_mark_all_is_optimised() -> None:
    assert asked_of_xla() > 0
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"


@pytest.mark.skipif(
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0", reason="all tests are optimised"
)
def test_after_the_mark_as_before() -> None:
    assert asked_of_xla() == 0
