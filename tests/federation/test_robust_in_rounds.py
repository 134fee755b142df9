"""Robust combinations in whole rounds: what attackers can move, and what does not go together."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, NormalisedMean, Weights
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import CentredClipping, CoordinateMedian, GroupRobust, Krum
from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.federation import Attackers, Federation, Participant, Threshold
from fedjax_llm.training import Drift, LocalTraining

from .whole_rounds import FINE, changes_of, close, many, product, rule, run, update_of

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]
READING = sorted(name for name, rule in RULES.items() if rule.needs_individual_messages)


@pytest.fixture(scope="module")
def of_the_honest(federate: Build, make_participants: Clouds) -> np.ndarray:
    """The update of six clients of whom nobody attacks."""
    return update_of(federate(participants=many(make_participants), **FINE))


# One that draws and one that reads the others; the rest is drilled.
ATTACKING = [
    pytest.param(
        name, marks=[] if name in ("gaussian", "little-is-enough") else [pytest.mark.drill]
    )
    for name in ATTACKS
]


@pytest.mark.parametrize("name", ATTACKING)
def test_attackers_change_what_they_send(
    federate: Build, make_participants: Clouds, of_the_honest: np.ndarray, name: str
) -> None:
    malicious = Attackers(ATTACKS[name], (False, True) + (False,) * 4, 3.0)
    federation = federate(attackers=malicious, participants=many(make_participants), **FINE)
    assert not close(update_of(federation), of_the_honest, 1e-3)


def test_an_attack_by_nobody_changes_nothing(
    federate: Build, make_participants: Clouds, of_the_honest: np.ndarray
) -> None:
    nobody = Attackers(ATTACKS["gaussian"], (False,) * 6, 3.0)
    federation = federate(attackers=nobody, participants=many(make_participants), **FINE)
    assert close(update_of(federation), of_the_honest, 1e-6)


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


def test_directions_count_alike(federate: Build) -> None:
    """Fed-NGA: a client that sends a hundredfold update counts like any other."""
    fine = FINE | {"update_bound": 1.0, "combine": NormalisedMean()}
    loud = Attackers(ATTACKS["scaled"], (True, False, False), 1.0)
    assert close(update_of(federate(attackers=loud, **fine)), update_of(federate(**fine)), 1e-6)
    changes_KxP, _, _ = changes_of(federate(**FINE))
    units = changes_KxP / np.linalg.norm(changes_KxP, axis=1, keepdims=True)
    assert close(update_of(federate(**fine)), units.mean(0), 1e-4)


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


def test_a_robust_combination_is_refused_where_too_few_can_be_reached(
    federate: Build, make_participants: Clouds
) -> None:
    """With one of five away, krum against one attacker would be the mean by another name."""
    clouds = many(make_participants, 5)
    clouds[0] = dataclasses.replace(clouds[0], offline_rounds=frozenset({1}))
    federation = federate(participants=clouds, combine=Krum(1))
    with pytest.raises(UserError, match="krum needs at least 5 clients in a round"):
        federation.run_round(federation.init())
