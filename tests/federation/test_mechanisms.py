"""Noise of every mechanism in a real federation: what is added, by whom, and what is refused."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import FactorAveraging, FedSvd, FfaLora, RoLora
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, Masked, Plain, Threshold
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.shares import mechanism_and_bits
from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import Model
from fedjax_llm.privacy import (
    AdaptiveClip,
    Banded,
    Buffered,
    Correlation,
    DiscreteGaussianShares,
    LambdaCgd,
    PerFactor,
    PerLayer,
    PrivacyPlan,
    SkellamShares,
    gaussian_noise_like,
    secret_key,
)
from fedjax_llm.training import Drift, ExamplePrivacy, LocalTraining

Build = Callable[..., Federation]
ROUNDS = 4
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
CLIENT = {"rounds": ROUNDS, "clip_norm": 0.1, "noise_multiplier": 0.7, "delta": 1e-2}


def clients_plan(clients: int = 3, **changes: Any) -> PrivacyPlan:
    return PrivacyPlan.for_clients(clients, **(CLIENT | changes))


def integer_plan(model: Model, shares: Any, **changes: Any) -> PrivacyPlan:
    settings = CLIENT | changes
    integer, _ = mechanism_and_bits(
        model.config,
        LORA,
        FfaLora(optax.sgd(1.0)),
        shares,
        clip_norm=settings["clip_norm"],
        noise_multiplier=settings["noise_multiplier"],
        control=False,
        bits=None,
    )
    settings = {"trust": "distributed", "integer": integer} | changes
    return clients_plan(shares.clients, **settings)


def adapter(state: Any) -> np.ndarray:
    leaves = jax.tree.leaves(state.server.adapter.factors)
    return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


CORRELATED: list[Callable[[int], Correlation]] = [
    lambda steps: LambdaCgd(steps, 0.5),
    lambda steps: Banded(steps, 3),
    lambda steps: Buffered(steps, 2, 3),
]
each_correlation = pytest.mark.parametrize(
    "correlation", CORRELATED, ids=["lambda-cgd", "banded", "buffered"]
)


@each_correlation
def test_the_servers_noise_hangs_together(
    federate: Build, correlation: Callable[[int], Correlation]
) -> None:
    """Against a run whose noise is negligible: the difference of a round's sum is row t of C^-1 z.

    Clients that hold no optimiser state and do one step of sgd at a rate of nothing, so that their
    messages are zero and the noise is all that moves the adapter.
    """
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    kind = correlation(ROUNDS)
    federation = federate("client", ROUNDS, plan=clients_plan(correlation=kind), training=still)
    state = federation.init()
    z = [
        gaussian_noise_like(
            key_for(federation._seed, Purpose.SERVER_NOISE, number),
            jax.ShapeDtypeStruct((federation.parameters,), jnp.float32),
            0.07,
        )
        for number in range(1, ROUNDS + 1)
    ]
    held = kind.init(jnp.zeros(federation.parameters))
    for step in range(ROUNDS):
        before = adapter(state)
        state, _ = federation.run_round(state)
        expected, held = kind.next(jnp.int32(step), lambda i: jnp.stack(z)[i], held)
        moved = adapter(state) - before
        moved = moved[moved != 0]  # A stays
        np.testing.assert_allclose(np.sort(moved), np.sort(expected / 3), atol=1e-6)


# Buffered noise keeps the most; the others' state goes the same way.
@pytest.mark.parametrize(
    "correlation",
    [
        pytest.param(CORRELATED[0], id="lambda-cgd", marks=pytest.mark.drill),
        pytest.param(CORRELATED[1], id="banded", marks=pytest.mark.drill),
        pytest.param(CORRELATED[2], id="buffered"),
    ],
)
def test_a_run_with_correlated_noise_is_taken_up_where_it_stopped(
    federate: Build, correlation: Callable[[int], Correlation]
) -> None:
    """Unit example, one cloud offline for a round: noise goes on, state survives a checkpoint."""
    kind = correlation(ROUNDS * 2)
    parts = {
        "plan": PrivacyPlan.for_examples(
            [20, 32, 26],
            expected_batch=6,
            steps_per_round=2,
            rounds=ROUNDS,
            clip_norm=0.5,
            noise_multiplier=0.8,
            delta=1e-3,
            correlation=kind,
            period=3,
        ),
        "training": LocalTraining(optax.adam(0.02), 2, 6, 4, ExamplePrivacy(0.5, 0.8, kind, 3)),
    }
    federation = federate("example", ROUNDS, **parts)
    states = [state for state, _ in federation.rounds(federation.init(), ROUNDS)]
    again = federate("example", ROUNDS, **parts)
    saved = jax.tree.map(np.asarray, states[1])
    resumed = [state for state, _ in again.rounds(jax.tree.map(jnp.asarray, saved), 2)]
    assert same(resumed[-1], states[-1])
    independent = federate("example", ROUNDS)
    _, other = list(independent.rounds(independent.init(), 2))
    assert not np.allclose(adapter(other[0]), adapter(states[1]))


def test_turns_come_once_a_period(federate: Build) -> None:
    """With full participation in turns of three, each step takes a third of the rows."""
    same_size = [
        dataclasses.replace(cloud, train=jax.tree.map(lambda leaf: leaf[:18], cloud.train))
        for cloud in federate().participants
    ]
    plan = PrivacyPlan.for_examples(
        [18, 18, 18],
        expected_batch=6,
        steps_per_round=3,
        rounds=1,
        clip_norm=0.5,
        noise_multiplier=0.8,
        delta=1e-3,
        period=3,
    )
    assert plan.sampler.kind == "full" and plan.expected_sizes == (6, 6, 6)
    training = LocalTraining(optax.adam(0.02), 3, 6, 4, ExamplePrivacy(0.5, 0.8, None, 3))
    federation = federate("example", 1, plan=plan, training=training, participants=same_size)
    _, report = federation.run_round(federation.init())
    assert [cloud.rows for cloud in report.clouds.values()] == [18, 18, 18]  # each once a period


def test_clients_take_turns(federate: Build) -> None:
    federation = federate("client", 4, plan=clients_plan(period=2))
    assert federation.roster.selected(1).tolist() == [True, False, True]
    assert federation.roster.selected(2).tolist() == [False, True, False]
    assert federation.roster.selected(3).tolist() == [True, False, True]
    assert federation.roster.divisor(np.ones(3, bool), False) == 1.5


@pytest.mark.parametrize("kind", [SkellamShares, DiscreteGaussianShares])
@pytest.mark.parametrize("offline", [{}, {"south": frozenset({1})}])
def test_the_opened_sum_holds_the_noise_of_all_shares(
    federate: Build,
    model: Model,
    make_participants: Callable[..., Any],
    kind: Any,
    offline: dict[str, frozenset[int]],
) -> None:
    """Messages of zero: what the sum opens to is noise, of the promised variance or more."""
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    plan = integer_plan(model, kind(3, dropouts=1))
    federation = federate(
        "client",
        ROUNDS,
        plan=plan,
        training=still,
        sum_mode=Masked(2, 2),
        participants=make_participants(**offline),
    )
    state = federation.init()
    before = adapter(state)
    state, _ = federation.run_round(state)
    moved = (adapter(state) - before)[adapter(state) != before]
    shares = 3 - len(offline)
    stddev = 0.07 * math.sqrt(shares / 2) / shares
    # Of some 400 numbers: four standard errors.
    measured = float(np.sqrt(np.mean(np.square(moved))))
    assert measured == pytest.approx(stddev, rel=4 / math.sqrt(2 * moved.size) + 0.01)


def test_every_hidden_sum_opens_to_the_same_noise(federate: Build, model: Model) -> None:
    plan = integer_plan(model, SkellamShares(3))
    found = []
    for mode in (Masked(2, 3), Threshold(2, 3)):
        federation = federate("client", ROUNDS, plan=plan, sum_mode=mode)
        state, _ = federation.run_round(federation.init())
        found.append(adapter(state))
    np.testing.assert_array_equal(found[0], found[1])


def test_local_trust_adds_the_whole_noise_to_every_message(federate: Build, model: Model) -> None:
    """So the plain sum may be used, and the mean has sqrt(K) times as much of it."""
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    plan = integer_plan(model, SkellamShares(3, dropouts=2), trust="local")
    federation = federate("client", ROUNDS, plan=plan, training=still, sum_mode=Plain())
    state = federation.init()
    before = adapter(state)
    state, _ = federation.run_round(state)
    moved = (adapter(state) - before)[adapter(state) != before]
    measured = float(np.sqrt(np.mean(np.square(moved))))
    assert measured == pytest.approx(0.07 / math.sqrt(3), rel=4 / math.sqrt(2 * moved.size) + 0.01)


def test_a_round_of_too_few_shares_is_refused_before_anyone_trains(
    federate: Build, model: Model, make_participants: Callable[..., Any]
) -> None:
    with pytest.raises(Refused, match="2 clients are online, and the noise is planned for"):
        federate(
            "client",
            ROUNDS,
            plan=integer_plan(model, SkellamShares(3)),
            sum_mode=Masked(2, 3),
            participants=make_participants(west=frozenset({3})),
        )


def test_noise_that_does_not_suit_the_run_is_refused(federate: Build, model: Model) -> None:
    plan = integer_plan(model, SkellamShares(3))
    with pytest.raises(Refused, match="each message, or a part of it, under its own share"):
        federate("client", ROUNDS, plan=plan)
    with pytest.raises(Refused, match="sums of 2 clouds may be opened"):
        federate("client", ROUNDS, plan=plan, sum_mode=Masked(2, 2))
    pooled = integer_plan(model, SkellamShares(3, 0, 2))
    with pytest.raises(Refused, match="2 colluding clients can be 2 clouds"):
        federate("client", ROUNDS, plan=pooled, sum_mode=Masked(2, 3))
    with pytest.raises(Refused, match="its epsilon would be wrong"):
        federate("client", ROUNDS, plan=plan, sum_mode=Masked(2, 3), value_bits=10)
    other = LoraConfig(rank=3, alpha=4.0, targets=("q_proj", "v_proj"))
    with pytest.raises(Refused, match="its epsilon would be wrong"):
        federate("client", ROUNDS, plan=plan, sum_mode=Masked(2, 3), lora=other)
    four = integer_plan(model, SkellamShares(4))
    with pytest.raises(Refused, match=r"accounts for \(4,\) clients|planned for 4 clients"):
        federate("client", ROUNDS, plan=four, sum_mode=Masked(2, 3))
    quarter = dataclasses.replace(plan, trust="local")
    with pytest.raises(Refused, match='with trust "local" each share is the whole noise'):
        federate("client", ROUNDS, plan=quarter)


@pytest.mark.parametrize("rule", [RoLora, FedSvd])
def test_correlated_noise_needs_the_same_coordinates_every_round(
    federate: Build, rule: Any
) -> None:
    plan = clients_plan(correlation=LambdaCgd(ROUNDS, 0.5))
    with pytest.raises(UserError, match="takes off what was added before"):
        federate("client", ROUNDS, plan=plan, rule=rule(optax.sgd(1.0)))
    assert federate("client", ROUNDS, plan=plan, rule=FactorAveraging(optax.sgd(1.0)))


def test_local_noise_other_than_planned_is_refused(federate: Build) -> None:
    kind = Banded(8, 2)
    with pytest.raises(Refused, match="the noise of local training hangs together by"):
        federate(
            "example",
            ROUNDS,
            training=LocalTraining(optax.adam(0.02), 2, 6, 4, ExamplePrivacy(0.5, 0.8, kind)),
        )
    with pytest.raises(Refused, match="one group in 2"):
        federate(
            "example",
            ROUNDS,
            training=LocalTraining(optax.adam(0.02), 2, 6, 4, ExamplePrivacy(0.5, 0.8, None, 2)),
        )


def test_a_budget_ends_the_rounds(federate: Build) -> None:
    plan = clients_plan()
    spent = plan.epsilon(2)
    assert spent is not None
    federation = federate("client", ROUNDS, plan=dataclasses.replace(plan, budget=spent))
    states = [state for state, _ in federation.rounds(federation.init(), 2)]
    with pytest.raises(Refused, match=r"accounts for 2 rounds within epsilon"):
        federation.run_round(states[-1])


ADAPTIVE = AdaptiveClip(0.1, quantile=0.5, learning_rate=0.3, count_stddev=1.0)


def test_the_clip_norm_of_clients_follows_the_quantile_under_encryption(federate: Build) -> None:
    """Too small a norm grows, too large a one shrinks; every sum ends in the same bytes."""
    quiet = {"noise_multiplier": 0.1, "delta": 1e-2}
    norms = {}
    for initial in (1e-3, 10.0):
        adaptive = AdaptiveClip(initial, 0.5, learning_rate=0.7, count_stddev=0.06)
        plan = clients_plan(clip_norm=initial, adaptive=adaptive, **quiet)
        federation = federate("client", ROUNDS, plan=plan)
        states = [state for state, _ in federation.rounds(federation.init(), ROUNDS)]
        norms[initial] = [float(state.clip.clip_norm) for state in states]
        hidden = federate("client", ROUNDS, plan=plan, sum_mode=Threshold(2, 2))
        two = [state for state, _ in hidden.rounds(hidden.init(), 2)]
        assert same(two[-1], states[1])
    assert norms[1e-3] == sorted(norms[1e-3]) and norms[1e-3][-1] > 2e-3
    assert norms[10.0] == sorted(norms[10.0], reverse=True) and norms[10.0][-1] < 5


def test_noise_of_an_adaptive_norm_is_that_of_its_round(federate: Build) -> None:
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    plan = clients_plan(adaptive=ADAPTIVE)
    federation = federate("client", ROUNDS, plan=plan, training=still)
    state = federation.init()
    for _ in range(2):
        before, norm = adapter(state), float(state.clip.clip_norm)
        state, _ = federation.run_round(state)
        moved = (adapter(state) - before)[adapter(state) != before]
        split = ADAPTIVE.sum_noise_multiplier(0.7)
        assert split > 0.7
        measured = float(np.sqrt(np.mean(np.square(moved)))) * 3
        assert measured == pytest.approx(split * norm, rel=4 / math.sqrt(2 * moved.size) + 0.01)


def test_the_clip_norm_of_examples_follows_the_quantile_in_each_cloud(federate: Build) -> None:
    adaptive = AdaptiveClip(1e-3, 0.5, learning_rate=0.5, count_stddev=0.5)
    plan = PrivacyPlan.for_examples(
        [20, 32, 26],
        expected_batch=6,
        steps_per_round=2,
        rounds=ROUNDS,
        clip_norm=1e-3,
        noise_multiplier=0.8,
        delta=1e-3,
        adaptive=adaptive,
    )
    privacy = ExamplePrivacy(1e-3, 0.8, adaptive=adaptive)
    training = LocalTraining(optax.adam(0.02), 2, 6, 4, privacy)
    federation = federate("example", ROUNDS, plan=plan, training=training)
    states = [state for state, _ in federation.rounds(federation.init(), ROUNDS)]
    norms_K = np.asarray(states[-1].clients.clip.clip_norm)
    assert norms_K.shape == (3,) and np.all(norms_K > 2e-3) and len(set(norms_K.tolist())) == 3
    again = [state for state, _ in federation.rounds(states[1], 2)]
    assert same(again[-1], states[-1])


@pytest.mark.parametrize("clip", [PerFactor(0.3, 0.4), PerLayer((0.3, 0.0001, 0.4))])
def test_kinds_of_clipping_are_counted_whole(federate: Build, clip: Any) -> None:
    """Clipping A and B each to the plan's norm moves the sum by more than the plan says."""
    sensitivity = float(clip.sensitivity)
    settings: dict[str, Any] = {
        "expected_batch": 6,
        "steps_per_round": 2,
        "rounds": ROUNDS,
        "noise_multiplier": 0.8,
        "delta": 1e-3,
    }
    training = LocalTraining(optax.adam(0.02), 2, 6, 4, ExamplePrivacy(clip, 0.8))
    plan = PrivacyPlan.for_examples([20, 32, 26], clip_norm=sensitivity, **settings)
    rule = FactorAveraging(optax.sgd(1.0))
    federation = federate("example", ROUNDS, plan=plan, training=training, rule=rule)
    federation.run_round(federation.init())
    less = PrivacyPlan.for_examples([20, 32, 26], clip_norm=0.4, **settings)
    with pytest.raises(Refused, match="local training clips and noises with"):
        federate("example", ROUNDS, plan=less, training=training, rule=rule)


@each_correlation
def test_control_variates_are_noised_with_the_message(
    federate: Build, correlation: Callable[[int], Correlation]
) -> None:
    training = LocalTraining(optax.adam(0.02), 2, 6, 4, drift=Drift(control=True))
    plan = clients_plan(correlation=correlation(ROUNDS), period=1)
    federation = federate("client", ROUNDS, plan=plan, training=training)
    for _, report in federation.rounds(federation.init(), 2):
        assert math.isfinite(report.update_norm)


def test_a_secret_generator_takes_no_key_of_a_seed(federate: Build) -> None:
    system = clients_plan(generator="system")
    with pytest.raises(Refused, match="one of JAX's own"):
        federate("client", ROUNDS, plan=system, noise_key=jax.random.key(0))
    with pytest.raises(Refused, match="no secret noise key"):
        federate("client", ROUNDS, plan=system)
    with pytest.raises(Refused, match="a secret noise key"):
        federate("client", ROUNDS, plan=clients_plan(), noise_key=secret_key())
    one, other = (
        federate("client", ROUNDS, plan=system, noise_key=secret_key(bytes([number]) * 32))
        for number in (1, 2)
    )
    first, second = (adapter(f.run_round(f.init())[0]) for f in (one, other))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, adapter(one.run_round(one.init())[0]))


def test_integers_so_coarse_that_rounding_takes_the_clip_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match=r"rounding \d+ parameters can take"):
        mechanism_and_bits(
            model.config,
            LoraConfig(rank=8, alpha=8.0, targets=("all-linear",)),
            FactorAveraging(optax.sgd(1.0)),
            SkellamShares(3),
            clip_norm=0.1,
            noise_multiplier=100.0,
            control=False,
            bits=None,
        )


def test_ghost_norms_end_near_the_same_adapter_and_refuse_unequal_ranks(
    federate: Build, make_participants: Callable[..., Any]
) -> None:
    found = []
    for method in ("vmap", "ghost"):
        privacy = ExamplePrivacy(0.5, 0.8, method=method)
        training = LocalTraining(optax.sgd(0.1), 2, 6, 4, privacy)
        federation = federate("example", ROUNDS, training=training)
        found.append(adapter(federation.run_round(federation.init())[0]))
    # Clipped rows are up to 2^-10 shorter by ghost norms.
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)
    clouds = make_participants()
    clouds[0] = dataclasses.replace(clouds[0], rank=1)
    ghost = ExamplePrivacy(0.5, 0.8, method="ghost")
    training = LocalTraining(optax.sgd(0.1), 2, 6, 4, ghost)
    with pytest.raises(UserError, match="ghost norms take one rank"):
        federate("example", ROUNDS, participants=clouds, training=training)
