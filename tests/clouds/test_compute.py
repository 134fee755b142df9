"""Speeds of clouds: operations counted by the compiler, seconds by hand, contradictions."""

import math

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm.clouds import Compute, training_flops
from fedjax_llm.errors import UserError

WIDTH, LAYERS, RANK, TOKENS = 128, 4, 8, 256


def counted(trained: str) -> float:
    """What XLA counts for one token of a stack of linear maps with adapters, all gradients taken.

    The input is differentiated too, as it would be with an adapter below: otherwise the lowest
    layer's gradient of activations would not be computed.
    """
    shapes = {
        "w_LxDxD": (LAYERS, WIDTH, WIDTH),
        "a_LxDxR": (LAYERS, WIDTH, RANK),
        "b_LxRxD": (LAYERS, RANK, WIDTH),
    }
    if trained == "all":
        del shapes["a_LxDxR"], shapes["b_LxRxD"]

    def loss(x_TxD: jax.Array, free: dict, frozen: dict) -> jax.Array:
        weights = free | frozen
        for layer in range(LAYERS):
            y_TxD = x_TxD @ weights["w_LxDxD"][layer]
            if "a_LxDxR" in weights:
                y_TxD += (x_TxD @ weights["a_LxDxR"][layer]) @ weights["b_LxRxD"][layer]
            x_TxD = y_TxD
        return (x_TxD**2).sum()

    values = {name: jnp.ones(shape) for name, shape in shapes.items()}
    frozen = {} if trained == "all" else {"w_LxDxD": values.pop("w_LxDxD")}
    step = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((TOKENS, WIDTH)), values, frozen)
    (cost,) = [step.compile().cost_analysis()]
    return cost["flops"] / TOKENS


@pytest.mark.optimised
def test_operations_are_those_that_the_compiler_counts():
    matrices, adapter = LAYERS * WIDTH**2, LAYERS * 2 * WIDTH * RANK
    assert training_flops(matrices) == pytest.approx(counted("all"), rel=0.02)
    frozen = training_flops(matrices, adapter=adapter)
    assert frozen == pytest.approx(counted("adapter"), rel=0.02)
    assert frozen < training_flops(matrices)


def test_attention_and_rematerialisation_by_hand():
    # PaLM, arXiv 2204.02311, appendix B: 12 L H Q T per token, without the causal half.
    sizes = {"layers": 2, "width": 64, "length": 128}
    assert training_flops(1e6, **sizes) - training_flops(1e6) == 12 * 2 * 64 * 128 / 2
    forward = 2e6 + 2 * 1e4 + 2 * 2 * 64 * 128
    again = training_flops(1e6, adapter=1e4, remat=True, **sizes)
    assert again - training_flops(1e6, adapter=1e4, **sizes) == forward


def test_seconds_by_hand():
    assert Compute(tokens_per_second=250.0).seconds(1000) == 4.0
    derived = Compute(peak_flops=1e12, utilization=0.5, flops_per_token=1e9, accelerators=4)
    assert derived.speed == 2000.0 and derived.seconds(1000) == 0.5
    assert Compute(peak_flops=1e12, flops_per_token=1e9).speed == 300.0, "30 % if nothing is said"
    later = Compute(peak_flops=1e12, utilization=0.5)
    assert later.for_model(1e9).speed == 500.0
    with pytest.raises(UserError, match=r"needs flops_per_token; give it, or"):
        later.seconds(1)
    measured = Compute(tokens_per_second=250.0)
    assert measured.for_model(1e9) is measured


def test_what_fits():
    assert Compute(1.0, memory_gib=2.0).fits(2**31) and not Compute(1.0, memory_gib=2.0).fits(
        2**31 + 1
    )
    assert not Compute(1.0, accelerators=8, memory_gib=2.0).fits(2**32), "each holds the model"
    with pytest.raises(UserError, match="memory_gib is not known; give it"):
        Compute(1.0).fits(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "compute needs tokens_per_second as measured, or the peak FLOP/s"),
        ({"tokens_per_second": 5.0, "peak_flops": 1e12}, "tokens_per_second = 5 .*keep one"),
        ({"tokens_per_second": 5.0, "utilization": 0.5}, "keep one of the two ways"),
        ({"tokens_per_second": 0.0}, "tokens_per_second must be positive and finite, got 0"),
        ({"tokens_per_second": math.nan}, "tokens_per_second must be positive and finite, got nan"),
        ({"peak_flops": math.inf}, "peak_flops must be positive and finite, got inf"),
        ({"peak_flops": 1e12, "utilization": 1.01}, "utilization must be .* got 1.01; it is"),
        ({"peak_flops": 1e12, "utilization": 0.0}, "utilization must be above 0"),
        ({"peak_flops": 1e12, "utilization": math.nan}, "utilization must be above 0"),
        ({"peak_flops": 1e12, "flops_per_token": -1.0}, "flops_per_token must be positive"),
        ({"tokens_per_second": 5.0, "memory_gib": 0.0}, "memory_gib must be positive"),
        ({"tokens_per_second": 5.0, "accelerators": 0}, "accelerators must be at least 1, got 0"),
    ],
)
def test_machines_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        Compute(**values)
