"""Local steps in whole rounds: their number, drift, gradients, and the step of the server."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, SERVER_OPTIMIZERS
from fedjax_llm.federation import Federation, Participant, Plain, Threshold
from fedjax_llm.training import Drift, LocalTraining

from .whole_rounds import FINE, changes_of, run, same_bytes, update_of

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]


def test_fewer_local_steps_are_as_if_the_others_were_not_there(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = [dataclasses.replace(p, local_steps=1) for p in make_participants()]
    four = federate(participants=clouds, training=LocalTraining(optax.adam(0.1), 4, 6, 4))
    state, reports = run(four, 1)
    assert all(cloud.rows == 6 for cloud in reports[0].clouds.values())
    # The first step of adam is the rate times the gradient's sign.
    start = four.init().server.adapter
    for name, new in state.server.adapter.factors.items():
        change = np.abs(np.asarray(new.b_LxRxF - start.factors[name].b_LxRxF))
        assert change.max() <= 0.1 * 1.001


def test_gradient_aggregation_is_centralised_descent(federate: Build) -> None:
    """Clients send one full-batch gradient each; the server's optimiser takes the step."""
    step = LocalTraining(optax.sgd(1.0), 1, 6, 6)
    federation = federate(rule=RULES["ffa"](optax.adam(0.05)), **(FINE | {"training": step}))
    changes_KxP, _, _ = changes_of(federation)
    gradient = -changes_KxP.mean(0)
    expected = -0.05 * gradient / (np.abs(gradient) + 1e-8)  # adam's first step
    found = update_of(federation)
    clear = np.abs(gradient) > 1e-4 * np.abs(gradient).max()
    np.testing.assert_allclose(found[clear], expected[clear], rtol=2e-2)


def test_the_proximal_term_keeps_clients_near(federate: Build) -> None:
    far, near = (
        update_of(
            federate(
                training=LocalTraining(optax.sgd(0.5), 8, 6, 4, drift=Drift(proximal=mu)),
                update_bound=4.0,
            )
        )
        for mu in (0.0, 1.0)
    )
    assert np.linalg.norm(near) < 0.7 * np.linalg.norm(far)


@pytest.mark.parametrize("mode", [Plain(), Threshold(2)], ids=["plain", "threshold"])
def test_scaffold_is_the_paper_s_algorithm(federate: Build, mode: Any) -> None:
    """Variates after a round: each client's is its mean gradient, the server's their mean."""
    training = LocalTraining(optax.sgd(0.5), 3, 6, 4, drift=Drift(control=True))
    federation = federate(training=training, sum_mode=mode, update_bound=8.0, value_bits=24)
    first, _ = federation.run_round(federation.init())
    own = first.clients.control[0]
    for name, sides in first.control[0].items():
        np.testing.assert_allclose(
            sides["b"], np.asarray(own[name]["b"]).mean(0), atol=2e-6
        )  # fixed point
        # Without correction in round 1, the change of three steps of sgd is minus 1.5 gradients.
        change = first.server.adapter.factors[name].b_LxRxF
        np.testing.assert_allclose(change, -1.5 * np.asarray(own[name]["b"]).mean(0), atol=2e-5)
    second, report = federation.run_round(first)
    plain, _ = federate(
        training=dataclasses.replace(training, drift=Drift()), update_bound=8.0
    ).run_round(federate().init())
    assert not same_bytes(second.server, plain.server)
    if isinstance(mode, Plain):
        assert report.clouds["north"].uplink_bytes == 4 * federation.parameters == 8 * 288


def test_scaffold_corrects_the_drift_of_the_clients(federate: Build) -> None:
    """With variates, clients of different data move alike: their updates are closer together."""
    spread = []
    for control in (False, True):
        training = LocalTraining(optax.sgd(0.3), 6, 20, 20, drift=Drift(control=control))
        federation = federate(training=training, update_bound=8.0, value_bits=24)
        state, _ = run(federation, 3)
        programs = federation._programs[0]
        local = programs.train(
            federation._base,
            federation.layout.replicate(state.globals),
            federation.roster.inputs(state.clients, 1, np.ones(3, bool)),
            federation._seed,
            jnp.int32(4),
        )
        ends = [np.asarray(local.after[n]["b"])[:3].reshape(3, -1) for n in ("q_proj", "v_proj")]
        ends_KxP = np.concatenate(ends, axis=1)
        start = np.concatenate(
            [np.ravel(state.server.adapter.factors[n].b_LxRxF) for n in ("q_proj", "v_proj")]
        )
        moved = ends_KxP - start
        spread.append(np.linalg.norm(moved - moved.mean(0)) / np.linalg.norm(moved.mean(0)))
    assert spread[1] < 0.5 * spread[0]


# A mean, moments and a look ahead; in a round the others differ by optax's own arithmetic alone.
TAKEN = ("fedavg", "fedadam", "diloco")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in TAKEN else [pytest.mark.drill])
        for name in sorted(SERVER_OPTIMIZERS)
    ],
)
def test_every_server_optimiser_takes_a_step(federate: Build, name: str) -> None:
    federation = federate(rule=RULES["ffa"](SERVER_OPTIMIZERS[name](0.01)))
    state, _ = run(federation, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.server))
    assert np.any(np.asarray(state.server.adapter.factors["q_proj"].b_LxRxF))
