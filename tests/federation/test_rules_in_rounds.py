"""Whole rounds of every rule: errors, bytes, personal adapters, ranks, hybrid clouds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, SERVER_OPTIMIZERS, NormalisedMean
from fedjax_llm.aggregation.robust import CoordinateMedian
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, Masked, Participant, Plain, Threshold, ToOpen
from fedjax_llm.federation.message import WeightCodec
from fedjax_llm.lora import LoraConfig
from fedjax_llm.training import LocalTraining

from .whole_rounds import SGD, hybrid, rule, run, same_bytes

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]


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


@pytest.mark.parametrize(
    "name", ["fedsvd", "hetlora", pytest.param("flexlora", marks=pytest.mark.drill)]
)
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
