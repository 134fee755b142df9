"""Whole rounds of every rule, compiled as users do: no sum and no number of devices moves a bit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_llm.aggregation import RULES
from fedjax_llm.federation import (
    Federation,
    FederationState,
    Masked,
    Participant,
    RoundReport,
    Threshold,
)

from .whole_rounds import FINE, rule, run, same_bytes

pytestmark = pytest.mark.optimised


Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]
ADDITIVE = sorted(name for name, rule in RULES.items() if not rule.needs_individual_messages)
GLOBAL = sorted(name for name, rule in RULES.items() if not rule.kept)


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
