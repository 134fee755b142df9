"""What a client counts for in a round: by its rows, its loss, its steps or its result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import LossWeights, Weights, step_norm
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, Participant, Plain, Threshold
from fedjax_llm.federation.message import WeightCodec
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import LocalTraining

from .whole_rounds import FINE, changes_of, close, rule, run, same_bytes, update_of

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]


@pytest.mark.parametrize(
    ("alpha", "mode"),
    [
        pytest.param(0.0, Plain(), id="0-plain"),
        pytest.param(0.5, Threshold(2), id="0.5-threshold"),
        pytest.param(2.0, Plain(), id="2-plain"),
        pytest.param(0.0, Threshold(2), id="0-threshold", marks=pytest.mark.drill),
        pytest.param(0.5, Plain(), id="0.5-plain", marks=pytest.mark.drill),
        pytest.param(2.0, Threshold(2), id="2-threshold", marks=pytest.mark.drill),
    ],
)
def test_the_dynamic_rule_is_the_published_one(federate: Build, mode: Any, alpha: float) -> None:
    """omega_k = L_k / (|D_k| B_k^alpha), over their sum (arXiv 2503.12226)."""
    federation = federate(weights=LossWeights(alpha), sum_mode=mode, **FINE)
    changes_KxP, losses_K, rows_K = changes_of(federation)
    bandwidths_K = np.array([p.cloud.link.up_mbps for p in federation.participants])
    omega_K = losses_K / (rows_K * bandwidths_K**alpha)
    expected = (omega_K / omega_K.sum()) @ changes_KxP
    assert close(update_of(federation), expected, 1e-4)


def test_bounded_weights_stay_within_their_bound(federate: Build) -> None:
    """Of any loss: one over c squared to one, and at most c times an ordinary cloud's."""
    weights = LossWeights(alpha=0.5, bound=2.0, loss=3.0, rows=25, up_mbps=20.0)
    beforehand = weights.beforehand([1, 10**9], [0.001, 10**6])
    for loss in (0.0, 1e-30, 3.0, 1e30, np.inf, np.nan, -np.inf, -5.0):
        for k in range(2):
            found = float(weights.weight(jnp.float32(beforehand[k]), jnp.float32(loss)))
            assert 0.25 <= found <= 1.0
    ordinary = weights.beforehand([25], [20.0])[0]
    assert float(weights.weight(ordinary, jnp.float32(3.0))) == pytest.approx(weights.ordinary)
    federation = federate(weights=weights, **FINE)
    changes_KxP, losses_K, rows_K = changes_of(federation)
    bandwidths_K = np.array([p.cloud.link.up_mbps for p in federation.participants])
    omega_K = losses_K / 3.0 * (25 / rows_K) * np.sqrt(20.0 / bandwidths_K)
    bounded_K = np.clip(omega_K, 0.5, 2.0)
    assert np.any(bounded_K != omega_K)
    assert close(update_of(federation), (bounded_K / bounded_K.sum()) @ changes_KxP, 1e-4)


def test_bounded_weights_keep_the_sensitivity_of_unit_client(federate: Build) -> None:
    """One client more or less moves the noiseless sum by at most the clip norm, and no other."""
    plan = PrivacyPlan.for_clients(
        3, rounds=4, clip_norm=0.1, noise_multiplier=0.7, delta=1e-2, weights="loss-bounded"
    )
    weights = LossWeights(alpha=0.5, bound=3.0, loss=3.0, rows=25, up_mbps=20.0)
    wild = LocalTraining(optax.sgd(1e3), 2, 6, 4)
    federation = federate("client", plan=plan, weights=weights, training=wild)
    state = federation.init()
    programs = federation._programs[0]
    sums = []
    for present in ([True] * 3, [True, True, False]):
        inputs = federation.roster.inputs(state.clients, 1, np.array(present))
        where = (federation._seed, jnp.int32(1))
        shared = federation.layout.replicate(state.globals)
        _, message = programs.train_and_send(federation._base, shared, inputs, *where)
        ints = np.asarray(programs._server.total(message.ints_P), np.float64)
        sums.append(ints * programs.codecs[0].fixed_point.step)
    assert 0.09 < np.linalg.norm(sums[0] - sums[1]) <= 0.1


@pytest.mark.parametrize(
    ("weights", "unit"),
    [
        ("examples", "client"),
        ("tokens", "client"),
        ("loss", "client"),
        ("result", "client"),
        ("tokens", "example"),
        ("loss", "example"),
        ("loss-bounded", "example"),
    ],
)
def test_weights_without_a_certificate_are_refused(
    federate: Build, weights: Any, unit: str
) -> None:
    """By the plan, and a plan that says otherwise does not fit the federation."""
    made: dict[str, Callable[[str], PrivacyPlan]] = {
        "client": lambda kind: PrivacyPlan.for_clients(
            3, rounds=4, clip_norm=0.1, noise_multiplier=0.7, delta=1e-2, weights=kind
        ),
        "example": lambda kind: PrivacyPlan.for_examples(
            [20, 32, 26],
            expected_batch=6,
            steps_per_round=2,
            rounds=4,
            clip_norm=0.5,
            noise_multiplier=0.8,
            delta=1e-3,
            weights=kind,
        ),
    }
    with pytest.raises(Refused, match=f"that unit {unit} is to hide"):
        made[unit](weights)
    changes: dict[str, Any] = {
        "examples": {"weights": [20.0, 32.0, 26.0]},
        "tokens": {"weights": Weights.of([3.0, 1.0, 2.0], 3, kind="tokens")},
        "loss": {"weights": LossWeights()},
        "loss-bounded": {"weights": LossWeights(bound=2.0)},
        "result": {"rule": rule("hetlora")},
    }[weights]
    with pytest.raises(Refused):
        federate(unit, plan=made[unit]("uniform"), **changes)


def test_public_weights_may_differ_with_unit_client(federate: Build) -> None:
    weights = Weights.of([1.0, 2.0, 4.0], 3, kind="uniform")
    state, _ = run(federate("client", weights=weights), 1)
    assert not same_bytes(state.server, run(federate("client"), 1)[0].server)


def test_a_weight_that_is_not_finite_is_an_error_that_names_its_client() -> None:
    weights = [0.0, 2.0**-48, 0.1, 1.0, 65535.9]
    limbs = np.stack([np.asarray(WeightCodec.encode(jnp.float32(w))) for w in weights])
    assert limbs.min() >= 0 and limbs.max() <= WeightCodec.MAX_INT
    for weight, own in zip(weights, limbs, strict=True):
        assert float(WeightCodec.decode(jnp.asarray(own))) == pytest.approx(weight, rel=1e-7)
    total = float(WeightCodec.decode(jnp.asarray(limbs.sum(0))))
    assert total == pytest.approx(sum(weights), rel=1e-6)
    for bad in (np.nan, np.inf, -1.0, 2.0**16):
        one = np.asarray(WeightCodec.encode(jnp.float32(bad)))[None]
        with pytest.raises(UserError, match="weight of client 'x' is not a number below"):
            WeightCodec.check(one, ["x"], 1)
    with pytest.raises(UserError, match="weights of all clients are zero"):
        WeightCodec.check(np.zeros((2, 4), np.int32), ["x", "y"], 1)


def test_fednova_is_the_paper_s_update(federate: Build, make_participants: Clouds) -> None:
    """tau_eff times the mean of Delta_k / tau_k, against clients that train alone."""
    clouds = make_participants()
    clouds[0] = dataclasses.replace(clouds[0], local_steps=1)
    norms = [step_norm(steps) for steps in (1, 4, 4)]
    training = LocalTraining(optax.sgd(0.5), 4, 6, 4)
    shares = np.array([20.0, 32.0, 26.0])
    weights = Weights.of(shares, 3, norms=norms)
    fine = FINE | {"training": training}
    federation = federate(participants=clouds, weights=weights, **fine)
    changes_KxP, _, _ = changes_of(federation)
    p_K = shares / shares.sum()
    tau = p_K @ np.array(norms)
    expected = tau * (p_K / np.array(norms)) @ changes_KxP
    assert close(update_of(federation), expected, 1e-4)
    plain = federate(participants=clouds, weights=Weights.of(shares, 3), **fine)
    assert close(update_of(plain), p_K @ changes_KxP, 1e-4)
    assert not close(expected, p_K @ changes_KxP, 1e-2)


def test_weights_by_result_do_not_hide_what_else_clients_are_weighed_by(federate: Build) -> None:
    plan = PrivacyPlan.for_examples(
        [20, 32, 26],
        expected_batch=6,
        steps_per_round=2,
        rounds=4,
        clip_norm=0.5,
        noise_multiplier=0.8,
        delta=1e-3,
        weights="result",
    )
    common = {"plan": plan, "rule": rule("hetlora")}
    federate("example", **common)
    with pytest.raises(Refused, match="number of tokens follow"):
        federate("example", weights=Weights.of([1.0, 2.0, 3.0], 3, kind="tokens"), **common)
    with pytest.raises(Refused, match="by loss follow"):
        federate("example", weights=LossWeights(bound=2.0), **common)
