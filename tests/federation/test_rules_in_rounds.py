"""Whole rounds of every rule: bytes that no sum changes, weights, ranks, drift, hybrid clouds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import (
    RULES,
    SERVER_OPTIMIZERS,
    LossWeights,
    NormalisedMean,
    Weights,
    step_norm,
)
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import CentredClipping, CoordinateMedian, GroupRobust, Krum
from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.federation import (
    Attackers,
    Federation,
    FederationState,
    Masked,
    Participant,
    Plain,
    RoundReport,
    Threshold,
    ToOpen,
)
from fedjax_llm.federation.message import WeightCodec
from fedjax_llm.lora import LoraConfig
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import Drift, LocalTraining

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]
SGD = LocalTraining(optax.sgd(0.5), 2, 6, 4)
FINE: dict[str, Any] = {"training": SGD, "update_bound": 4.0, "value_bits": 27}
ADDITIVE = sorted(name for name, rule in RULES.items() if not rule.needs_individual_messages)
READING = sorted(set(RULES) - set(ADDITIVE))
GLOBAL = sorted(name for name, rule in RULES.items() if not rule.kept)


def rule(name: str, rate: float = 1.0) -> Any:
    return RULES[name](optax.sgd(rate))


def run(federation: Federation, rounds: int = 2) -> tuple[FederationState, list[RoundReport]]:
    states = list(federation.rounds(federation.init(), rounds))
    return states[-1][0], [report for _, report in states]


def same_bytes(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


def product(state: FederationState) -> np.ndarray:
    adapter = state.server.adapter
    parts = []
    for name, (a, b) in adapter.factors.items():
        dense = adapter.scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        parts.append(dense + np.asarray(state.server.residual.get(name, 0.0), np.float64))
    return np.concatenate([part.ravel() for part in parts])


def close(one: np.ndarray, other: np.ndarray, error: float) -> bool:
    return bool(np.linalg.norm(one - other) <= error * np.linalg.norm(other))


# As many as a rule needs to go through all its phases.
def rounds_of(name: str) -> int:
    return max(2, len(RULES[name].phases))


@pytest.fixture(scope="module")
def settings(make_participants: Clouds) -> Callable[[str], dict[str, Any]]:
    """A federation of one rule, of different ranks if it can have them, in fine fixed point."""

    def of(name: str) -> dict[str, Any]:
        clouds = make_participants()
        if RULES[name].facts.ranks:
            clouds[0] = dataclasses.replace(clouds[0], rank=1)
        return {"rule": rule(name), "participants": clouds, **FINE}

    return of


@pytest.fixture(scope="module")
def played(
    federate: Build, settings: Callable[[str], dict[str, Any]]
) -> Callable[[str], tuple[Federation, FederationState, list[RoundReport]]]:
    """Rounds of a rule in the plain, on two devices; run once for all tests that look at them.

    The aggregation error is measured in these alone: that it is must not change a byte.
    """

    @functools.cache
    def of(name: str) -> tuple[Federation, FederationState, list[RoundReport]]:
        federation = federate(measure_error=True, **settings(name))
        return federation, *run(federation, rounds_of(name))

    return of


Played = Callable[[str], tuple[Federation, FederationState, list[RoundReport]]]
Settings = Callable[[str], dict[str, Any]]


@pytest.mark.each_rule
@pytest.mark.parametrize("name", ADDITIVE)
def test_rules_that_add_end_in_the_same_bytes_under_every_sum(
    federate: Build, played: Played, settings: Settings, name: str
) -> None:
    for mode in (Masked(), Threshold(2)):
        hidden, _ = run(federate(sum_mode=mode, **settings(name)), rounds_of(name))
        assert same_bytes(played(name)[1], hidden)


@pytest.mark.each_rule
@pytest.mark.parametrize("name", sorted(RULES))
def test_one_device_and_two_give_the_same_bytes(
    federate: Build, played: Played, settings: Settings, name: str
) -> None:
    one, _ = run(federate(devices=jax.devices()[:1], **settings(name)), rounds_of(name))
    assert len(played(name)[0].layout.mesh.devices) == 2
    assert same_bytes(one, played(name)[1])


@pytest.mark.each_rule
@pytest.mark.parametrize("name", GLOBAL)
def test_exact_rules_report_no_error_and_others_report_theirs(played: Played, name: str) -> None:
    """Up to fixed point, which the bound and its bits make small here; of different ranks."""
    errors = [report.aggregation_error for report in played(name)[2]]
    if RULES[name].facts.exact:
        assert max(errors) < 1e-5
    else:
        assert max(errors) > 1e-4


def test_the_error_is_not_measured_where_it_means_nothing(federate: Build) -> None:
    for changes in (
        {"rule": rule("fedsa")},
        {"combine": NormalisedMean()},
        {"combine": CoordinateMedian()},
    ):
        _, reports = run(federate(**({"measure_error": True} | changes)), 1)
        assert np.isnan(reports[0].aggregation_error)


def test_the_error_does_not_follow_the_server_optimiser(federate: Build) -> None:
    """It says how the rule aggregates; what an optimiser makes of the mean is meant."""
    plain, adam = (
        run(federate(rule=RULES["ffa"](SERVER_OPTIMIZERS[name](0.1)), measure_error=True), 1)[1][0]
        for name in ("fedavg", "fedadam")
    )
    assert adam.aggregation_error == pytest.approx(plain.aggregation_error, abs=1e-6)


@pytest.mark.each_rule
@pytest.mark.parametrize("name", sorted(RULES))
def test_bytes_reported_are_bytes_sent(played: Played, name: str) -> None:
    """Plain: the float32 arrays that a client of each rank has to send, and no padding."""
    federation, state, reports = played(name)
    for number, report in enumerate(reports, start=1):
        phase = federation.rule.phase(number)
        shapes, _ = federation.rule.messages(state.server, phase)
        arrays = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        weight = 16 * RULES[name].weighs_by_result
        assert report.clouds["south"].uplink_bytes == whole + weight
        own = report.clouds["north"].uplink_bytes - weight
        if RULES[name].facts.ranks and RULES[name].stages == 1:
            squared = RULES[name].phases[phase] == ("r",)
            assert own == whole // (4 if squared else 2)  # rank 1 of 2
        assert report.clouds["south"].downlink_bytes >= whole // max(1, RULES[name].stages * 2)


@pytest.mark.parametrize("name", ["hetlora", "fedask", "rolora"])
def test_sums_of_several_stages_count_all_they_send(federate: Build, name: str) -> None:
    federation = federate(rule=rule(name), sum_mode=Threshold(2))
    hidden = federation._hidden
    assert hidden is not None
    _, reports = run(federation, 2)
    for number, report in enumerate(reports, start=1):
        codecs: list[Any] = list(federation._programs[federation.rule.phase(number)].codecs)
        if RULES[name].weighs_by_result:
            codecs.append(WeightCodec)
        uploads = sum(hidden.upload_bytes(codec, "north") for codec in codecs)
        sent = report.clouds["north"].uplink_bytes
        assert uploads <= sent < uploads * 1.5 + 5e5 * len(codecs)


def test_personal_adapters_differ_and_are_evaluated_each_by_itself(federate: Build) -> None:
    federation = federate(rule=rule("fedsa"), training=SGD)
    state, _ = run(federation, 2)
    adapters = [federation.model_of(state, name)[1] for name in federation.names]
    b = [np.asarray(adapter.factors["q_proj"].b_LxRxF) for adapter in adapters]
    a = [np.asarray(adapter.factors["q_proj"].a_LxDxR) for adapter in adapters]
    assert np.array_equal(a[0], a[1]) and not np.array_equal(b[0], b[1])
    losses = federation.evaluate(state)
    for k, name in enumerate(federation.names):
        nll, tokens = federation._held_out.sums(federation._base, adapters[k])[k]
        assert losses[name] == nll / tokens
    with pytest.raises(UserError, match="no cloud 'east'"):
        federation.model_of(state, "east")


def test_what_is_folded_into_the_base_is_what_the_model_runs_with(federate: Build) -> None:
    """One client under flora: a fresh adapter every round on a base that remembers."""
    federation = federate(rule=rule("flora"), training=SGD, update_bound=4.0)
    state, _ = run(federation, 2)
    assert not np.any(np.asarray(state.server.adapter.factors["q_proj"].b_LxRxF))
    base, adapter = federation.model_of(state)
    assert not np.array_equal(
        base["layers"]["q_proj"]["kernel"], federation._base["layers"]["q_proj"]["kernel"]
    )
    before, after = federation.evaluate(federation.init()), federation.evaluate(state)
    assert all(after[name] != before[name] for name in before)
    merged = dataclasses.replace(federation.model, base=base)
    fresh = Federation(
        merged,
        federation.participants,
        lora=federation.lora,
        training=SGD,
        rule=rule("flora"),
        plan=federation.plan,
        sum_mode=Plain(),
    )
    again = fresh.evaluate(fresh.init()._replace(server=state.server._replace(residual={})))
    assert again == pytest.approx(after, abs=1e-5)
    assert adapter.scale == federation.lora.scale


# Weights.


def changes_of(federation: Federation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each client of ffa trains in round 1, its loss, and its rows: [K, P], [K], [K]."""
    state, count = federation.init(), len(federation.participants)
    local = federation._programs[0].train(
        federation._base,
        federation.layout.replicate(state.globals),
        federation.roster.inputs(state.clients, 1, np.ones(count, bool)),
        federation._seed,
        jnp.int32(1),
    )
    changes = [
        np.asarray(sides["b"])[:count] - np.asarray(state.server.adapter.factors[name].b_LxRxF)
        for name, sides in local.after.items()
    ]
    flat_KxP = np.concatenate([change.reshape(count, -1) for change in changes], axis=1)
    metrics = jax.device_get(local.metrics)
    losses_K = (metrics.loss_sum[:count] / metrics.rows[:count]).astype(np.float64)
    rows_K = np.array([p.rows for p in federation.participants], np.float64)
    return flat_KxP.astype(np.float64), losses_K, rows_K


def update_of(federation: Federation) -> np.ndarray:
    start = federation.init()
    state, _ = federation.run_round(start)
    return np.concatenate(
        [
            np.ravel(new.b_LxRxF - start.server.adapter.factors[name].b_LxRxF)
            for name, new in state.server.adapter.factors.items()
        ]
    ).astype(np.float64)


@pytest.mark.parametrize("mode", [Plain(), Threshold(2)], ids=["plain", "threshold"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
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


# Local steps, drift, gradients.


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


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_every_server_optimiser_takes_a_step(federate: Build, name: str) -> None:
    federation = federate(rule=RULES["ffa"](SERVER_OPTIMIZERS[name](0.01)))
    state, _ = run(federation, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.server))
    assert np.any(np.asarray(state.server.adapter.factors["q_proj"].b_LxRxF))


# Ranks.


@pytest.mark.parametrize("name", ["fedsvd", "hetlora", "flexlora"])
def test_clouds_of_different_ranks_train_together(
    federate: Build, make_participants: Clouds, name: str
) -> None:
    lora = LoraConfig(rank=4, alpha=4.0, targets=("q_proj", "v_proj"))
    clouds = [
        dataclasses.replace(p, rank=rank)
        for p, rank in zip(make_participants(), (1, 4, 2), strict=True)
    ]
    training = LocalTraining(optax.adam(0.05), 4, 6, 4)
    federation = federate(
        participants=clouds, lora=lora, rule=rule(name), training=training, update_bound=10.0
    )
    before = federation.evaluate(federation.init())
    state, _ = run(federation, 4)
    after = federation.evaluate(state)
    assert np.mean(list(after.values())) < np.mean(list(before.values()))


def test_ranks_that_a_rule_cannot_have_are_refused(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = make_participants()
    clouds[1] = dataclasses.replace(clouds[1], rank=1)
    with pytest.raises(UserError, match="one rank for all, 'south' has 1 and the adapter 2"):
        federate(participants=clouds, rule=rule("fedrot"))
    clouds[1] = dataclasses.replace(clouds[1], rank=3)
    with pytest.raises(UserError, match="rank of 'south' must be between 1 and 2"):
        federate(participants=clouds)


# Hybrid clouds.


def hybrid(clouds: list[Participant]) -> list[Participant]:
    """The first cloud as two clients, the others as they are."""
    return clouds[0].divided((9, 11)) + clouds[1:]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("ffa", Masked()), ("hetlora", Threshold(2)), ("fedask", Threshold(2))],
    ids=["ffa", "hetlora", "fedask"],
)
def test_clients_of_a_cloud_are_summed_inside_it(
    federate: Build, make_participants: Clouds, name: str, mode: Any
) -> None:
    """Four clients, three uploads; the same bytes as four that send to one plain server."""
    clouds = hybrid(make_participants())
    plain = federate(participants=clouds, rule=rule(name))
    hidden = federate(participants=clouds, rule=rule(name), sum_mode=mode)
    assert hidden.names == ("north", "south", "west")
    assert hidden.client_names == ("north-1", "north-2", "south", "west")
    assert "summed inside it in the plain" in hidden.statement()
    (one, _), (two, reports) = run(plain), run(hidden)
    assert same_bytes(one, two)
    assert set(reports[0].clouds) == set(hidden.names)
    sent = {cloud.uplink_bytes for cloud in reports[0].clouds.values()}
    assert max(sent) < 1.6 * min(sent)  # one upload each; two of three also decrypt


def test_hybrid_clouds_report_their_clients_together(
    federate: Build, make_participants: Clouds
) -> None:
    federation = federate(participants=hybrid(make_participants()))
    state, reports = run(federation, 1)
    assert reports[0].clouds["north"].rows == 2 * reports[0].clouds["south"].rows
    whole = federate().evaluate(federate().init())
    assert federation.evaluate(federation.init()) == pytest.approx(whole, abs=1e-5)
    assert same_bytes(state.round, np.int32(1))


def test_two_clients_of_one_name_are_refused(federate: Build, make_participants: Clouds) -> None:
    first, second = make_participants()[:2]
    twin = dataclasses.replace(second, cloud=first.cloud)
    with pytest.raises(UserError, match="cloud name 'north' is used twice"):
        federate(participants=[first, twin])


# Robust combinations.


def many(make_participants: Clouds, count: int = 6) -> list[Participant]:
    """Clients of one task, as clouds of their own."""
    source = make_participants()[1]
    parts = source.divided((5,) * (count - 1) + (32 - 5 * (count - 1),))
    return [
        dataclasses.replace(p, cloud=dataclasses.replace(p.cloud, name=f"c{k}"), client=None)
        for k, p in enumerate(parts)
    ]


def test_attackers_change_what_they_send_and_nothing_else(
    federate: Build, make_participants: Clouds
) -> None:
    fine = FINE | {"participants": many(make_participants)}
    one = update_of(federate(**fine))
    for attack in ATTACKS.values():
        malicious = Attackers(attack, (False, True) + (False,) * 4, 3.0)
        assert not close(update_of(federate(attackers=malicious, **fine)), one, 1e-3)
    nobody = Attackers(ATTACKS["gaussian"], (False,) * 6, 3.0)
    assert close(update_of(federate(attackers=nobody, **fine)), one, 1e-6)


@pytest.mark.each_rule
@pytest.mark.parametrize("name", ["ffa", "fedsvd"])
def test_a_robust_combination_withstands_a_client_that_scales(
    federate: Build, make_participants: Clouds, name: str
) -> None:
    """The attacker pulls the mean far off and a robust combination hardly."""
    malicious = Attackers(ATTACKS["scaled"], (True,) + (False,) * 5, -50.0)
    common = FINE | {"participants": many(make_participants), "rule": rule(name)}
    common["update_bound"] = 100.0
    clean = product(run(federate(**common), 1)[0])

    def moved(combine: Any) -> float:
        state, _ = run(federate(combine=combine, attackers=malicious, **common), 1)
        return float(np.linalg.norm(product(state) - clean))

    by_mean = moved(None)
    for combine in (Krum(1), CoordinateMedian(), CentredClipping(0.05)):
        assert moved(combine) < 0.2 * by_mean


@pytest.mark.parametrize("mode", [Threshold(2), Masked()], ids=["threshold", "masked"])
def test_group_sums_are_combined_robustly_under_every_sum(
    federate: Build, make_participants: Clouds, mode: Any
) -> None:
    """Three groups of two; one holds an attacker; the server sees three sums and takes a median."""
    clouds = many(make_participants)
    malicious = Attackers(ATTACKS["sign-flip"], (True,) + (False,) * 5, 50.0)
    groups = GroupRobust(3, CoordinateMedian())
    common = {
        "participants": clouds,
        "update_bound": 100.0,
        "training": SGD,
        "attackers": malicious,
    }
    plain, _ = run(federate(combine=groups, **common), 2)
    state, _ = run(federate(combine=groups, sum_mode=mode, **common), 2)
    assert same_bytes(plain, state)
    mean, _ = run(federate(**common), 2)
    assert np.linalg.norm(product(state)) < 0.5 * np.linalg.norm(product(mean))


def test_a_group_of_one_reachable_cloud_is_not_opened(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = many(make_participants)
    clouds[0] = dataclasses.replace(clouds[0], offline_rounds=frozenset({1}))
    federation = federate(
        participants=clouds, combine=GroupRobust(3, CoordinateMedian()), sum_mode=Threshold(2)
    )
    with pytest.raises(Refused, match=r"needs|at least"):
        federation.run_round(federation.init())


def test_directions_count_alike_under_every_sum(federate: Build) -> None:
    """Fed-NGA: a client that sends a hundredfold update counts like any other."""
    fine = FINE | {"update_bound": 1.0, "combine": NormalisedMean()}
    loud = Attackers(ATTACKS["scaled"], (True, False, False), 1.0)
    assert close(update_of(federate(attackers=loud, **fine)), update_of(federate(**fine)), 1e-6)
    changes_KxP, _, _ = changes_of(federate(**FINE))
    units = changes_KxP / np.linalg.norm(changes_KxP, axis=1, keepdims=True)
    assert close(update_of(federate(**fine)), units.mean(0), 1e-4)
    plain, _ = run(federate(**fine), 1)
    hidden, _ = run(federate(sum_mode=Threshold(2), **fine), 1)
    assert same_bytes(plain, hidden)


def test_a_zero_message_has_no_direction() -> None:
    zero = {"q_proj": {"b": jnp.zeros((2, 3, 4))}}
    assert not np.any(NormalisedMean().of(zero)["q_proj"]["b"])
    for size in (1e-30, 1.0, 1e30):
        one = {"q_proj": {"b": jnp.full((2, 3, 4), size, jnp.float32)}}
        found = np.asarray(NormalisedMean().of(one)["q_proj"]["b"], np.float64)
        assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-6)


SCAFFOLD = LocalTraining(optax.sgd(0.5), 2, 6, 4, drift=Drift(control=True))
STEPS = Weights.of(None, 3, norms=[1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"combine": Krum(0), "sum_mode": Threshold(2)}, Refused, "has to read each cloud"),
        ({"combine": Krum(1)}, UserError, "krum"),
        ({"combine": CoordinateMedian(), "weights": [1.0, 2.0, 3.0]}, UserError, "counts each"),
        ({"combine": CoordinateMedian(), "rule": rule("hetlora")}, UserError, "counts each"),
        ({"combine": CoordinateMedian(), "rule": rule("fedask")}, UserError, "only a mean"),
        ({"combine": CoordinateMedian(), "rule": rule("flora")}, UserError, "combines the"),
        ({"combine": GroupRobust(2, CoordinateMedian())}, UserError, "group of one is no secret"),
        (
            {
                "training": LocalTraining(optax.sgd(0.5), 2, 6, 4, drift=Drift(control=True)),
                "rule": rule("fedsa"),
            },
            UserError,
            "control variates",
        ),
        ({"training": SCAFFOLD, "rule": rule("fedsvd")}, UserError, "new coordinates"),
        ({"weights": STEPS, "rule": rule("flora")}, UserError, "normalise_steps"),
        ({"weights": STEPS, "rule": rule("hetlora")}, UserError, "normalise_steps"),
        ({"weights": STEPS, "combine": NormalisedMean()}, UserError, "normalise_steps"),
        ({"combine": CentredClipping(1.0), "rule": rule("rolora")}, UserError, "like with like"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    federate: Build, changes: dict[str, Any], kind: type[FedJaxError], match: str
) -> None:
    with pytest.raises(kind, match=match) as caught:
        federate(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *[{"rule": rule(name)} for name in [*READING, "fedask", "fedsa"]],
        {"combine": CoordinateMedian()},
    ],
)
def test_what_adds_no_noise_to_one_sum_is_refused_for_unit_client(
    federate: Build, changes: dict[str, Any]
) -> None:
    with pytest.raises(Refused, match=r"unit 'client'|'client' (accounts|choose)"):
        federate("client", **changes)


@pytest.mark.parametrize("attack", ["gaussian", "little-is-enough"])
def test_attackers_that_read_others_are_refused_for_unit_client(
    federate: Build, attack: str
) -> None:
    """One client more or less would change several messages."""
    malicious = Attackers(ATTACKS[attack], (True, False, False), 1.0)
    with pytest.raises(Refused, match="no epsilon covers that"):
        federate("client", attackers=malicious)
    federate("client", attackers=dataclasses.replace(malicious, attack=ATTACKS["sign-flip"]))


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


def test_a_robust_combination_is_refused_where_too_few_can_be_reached(
    federate: Build, make_participants: Clouds
) -> None:
    """With one of five away, krum against one attacker would be the mean by another name."""
    clouds = many(make_participants, 5)
    clouds[0] = dataclasses.replace(clouds[0], offline_rounds=frozenset({1}))
    federation = federate(participants=clouds, combine=Krum(1))
    with pytest.raises(UserError, match="krum needs at least 5 clients in a round"):
        federation.run_round(federation.init())


def test_what_is_about_to_be_opened_is_told_before_it_is(
    federate: Build, make_participants: Clouds
) -> None:
    """And what the listener raises ends the round before any sum; the integers repeat."""
    clouds = make_participants(south=frozenset({1}))
    federation = federate(participants=clouds, rule=rule("hetlora"), sum_mode=Masked())
    told: list[ToOpen] = []
    stages: list[str] = []

    def refuse(what: ToOpen) -> None:
        told.append(what)
        raise Refused("no")

    with pytest.raises(Refused, match="no"):
        federation.run_round(federation.init(), stages.append, refuse)
    assert told[0][:3] == (1, 0, ("north", "west")) and stages == ["train"]
    federation.run_round(federation.init(), before_opening=told.append)
    # Of weights and of messages.
    assert [what.sum for what in told] == [0, 0, 1]
    assert told[1] == told[0] and told[2].digest != told[1].digest
