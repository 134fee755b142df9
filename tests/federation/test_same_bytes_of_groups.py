"""Clients summed in their cloud, and groups of clouds: compiled as users do, no sum moves a bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedjax_llm.aggregation import NormalisedMean
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import CoordinateMedian, GroupRobust
from fedjax_llm.federation import (
    Attackers,
    Federation,
    FederationState,
    Masked,
    Participant,
    Threshold,
)

from .whole_rounds import FINE, SGD, hybrid, many, product, rule, run, same_bytes

pytestmark = pytest.mark.optimised


Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("ffa", Masked(), id="ffa"),
        pytest.param("hetlora", Threshold(2), id="hetlora", marks=pytest.mark.drill),
        pytest.param("fedask", Threshold(2), id="fedask"),
    ],
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


@pytest.fixture(scope="module")
def attacked(make_participants: Clouds) -> dict[str, Any]:
    """Six clouds, of which the first pulls the mean far off."""
    return {
        "participants": many(make_participants),
        "update_bound": 100.0,
        "training": SGD,
        "attackers": Attackers(ATTACKS["sign-flip"], (True,) + (False,) * 5, 50.0),
    }


# Three groups of two; one holds the attacker; the server sees three sums and takes a median.
GROUPS = GroupRobust(3, CoordinateMedian())


@pytest.fixture(scope="module")
def in_the_plain(
    federate: Build, attacked: dict[str, Any]
) -> tuple[FederationState, FederationState]:
    """What two rounds of a plain sum come to: with groups, and as a mean."""
    return run(federate(combine=GROUPS, **attacked), 2)[0], run(federate(**attacked), 2)[0]


@pytest.mark.parametrize("mode", [Threshold(2), Masked()], ids=["threshold", "masked"])
def test_group_sums_are_combined_robustly_under_every_sum(
    federate: Build,
    attacked: dict[str, Any],
    in_the_plain: tuple[FederationState, FederationState],
    mode: Any,
) -> None:
    plain, mean = in_the_plain
    state, _ = run(federate(combine=GROUPS, sum_mode=mode, **attacked), 2)
    assert same_bytes(plain, state)
    assert np.linalg.norm(product(state)) < 0.5 * np.linalg.norm(product(mean))


def test_directions_end_in_the_same_bytes_under_encryption(federate: Build) -> None:
    fine = FINE | {"update_bound": 1.0, "combine": NormalisedMean()}
    plain, _ = run(federate(**fine), 1)
    hidden, _ = run(federate(sum_mode=Threshold(2), **fine), 1)
    assert same_bytes(plain, hidden)
