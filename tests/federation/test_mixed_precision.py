"""Rounds on a quantised base and with bfloat16 activations: what clients train stays float32."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES
from fedjax_llm.federation import Federation
from fedjax_llm.models import Model, base_bytes, dequantised_base, quantised_base
from fedjax_llm.training import LocalTraining

Build = Callable[..., Federation]
SGD = LocalTraining(optax.sgd(0.5), 2, 6, 4, None)


@pytest.fixture
def small(model: Model) -> Model:
    return dataclasses.replace(model, base=quantised_base(model.base, "nf4-double"))


def trained(federation: Federation, rounds: int):
    state = federation.init()
    before = federation.evaluate(state)
    for _ in range(rounds):
        state, report = federation.run_round(state)
    return state, report, before, federation.evaluate(state)


def test_training_on_four_bits_with_bfloat16_activations_learns(
    federate: Build, small: Model
) -> None:
    federation = federate(model=small, dtype=jnp.bfloat16, clients_at_once=3, update_bound=8.0)
    state, report, before, after = trained(federation, 4)
    assert all(after[name] < before[name] for name in before)
    assert np.mean(list(after.values())) < np.mean(list(before.values())) - 0.02
    assert np.isfinite(report.loss_train_nats)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("unit", ["client", pytest.param("example", marks=pytest.mark.drill)])
def test_clipping_and_noise_do_not_see_the_activations_dtype(federate: Build, unit: str) -> None:
    """Messages of both have the same noise to the bit, so that they differ by the training alone.

    Noise in bfloat16 would differ by its rounding, 2^-9 of it.
    """
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        # A rate of almost zero leaves noise as all that the clients send.
        training = LocalTraining(optax.sgd(1e-12), 2, 6, 4, None)
        if unit == "example":
            training = dataclasses.replace(SGD, privacy=federate(unit)._training.privacy)
        federation = federate(unit, dtype=dtype, training=training)
        state, _ = federation.run_round(federation.init())
        found[dtype] = np.concatenate(
            [np.ravel(b) for _, b in state.server.adapter.factors.values()]
        )
    single, half = found.values()
    assert single.dtype == half.dtype == np.float32
    if unit == "client":
        np.testing.assert_array_equal(single, half)
    else:
        assert np.linalg.norm(single - half) < 2**-7 * np.linalg.norm(single)
        assert not np.array_equal(single, half)
        # Bits below those of bfloat16 are in use.
        assert np.any(half != half.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.drill
def test_a_quantised_base_trains_as_the_float_model_it_stands_for(
    federate: Build, small: Model
) -> None:
    """FLoRA folds every round into the base: kept apart here, added there."""
    floats = dataclasses.replace(small, base=dequantised_base(small.base))
    states = []
    for model in (small, floats):
        rule = RULES["flora"](optax.sgd(1.0))
        federation = federate(model=model, rule=rule, training=SGD, update_bound=8.0)
        states.append(trained(federation, 2))
    (_, _, _, one), (_, _, _, other) = states
    assert one == pytest.approx(other, abs=1e-3)
    weights, _ = federation.model_of(states[1][0])
    assert base_bytes(small.base) < base_bytes(weights)
