"""Compression inside rounds: against NumPy, under every sum, with memory, bytes, refusals."""

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, FfaLora, NormalisedMean
from fedjax_llm.clouds.schedules import FedBuff
from fedjax_llm.compression import (
    Chain,
    Fragment,
    Identity,
    PowerSgd,
    RandomMask,
    Rotated,
    Sketch,
    TopMask,
    TurnMask,
)
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import (
    Compression,
    Federation,
    FederationState,
    Threshold,
)
from fedjax_llm.training import Drift, LocalTraining

EACH = [
    Compression(Rotated(), rounding="stochastic"),
    Compression(Chain((TurnMask(one_in=4), Rotated())), error_feedback=True, rounding="stochastic"),
    Compression(TopMask(one_in=4), error_feedback=True),
    Compression(Sketch(), error_feedback=True),
    Compression(PowerSgd(rank=1), error_feedback=True),
    Compression(Fragment(3), error_feedback=True),
]


def drilled(*tested: str) -> list:
    """`EACH`; those that are not named have the same code between them and the federation."""
    return [
        pytest.param(
            one, id=one.codec.name, marks=[] if one.codec.name in tested else [pytest.mark.drill]
        )
        for one in EACH
    ]


def run(federation: Federation, rounds: int = 3) -> tuple[FederationState, list]:
    state, reports = federation.init(), []
    for after, report in federation.rounds(state, rounds):
        state = after
        reports.append(report)
    return state, reports


def same(one: FederationState, other: FederationState) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.mark.optimised
@pytest.mark.parametrize("compression", drilled("power-sgd"))
def test_plain_and_encrypted_end_in_the_same_bytes(federate, compression):
    plain, _ = run(federate(compression=compression, value_bits=12))
    hidden, _ = run(federate(compression=compression, value_bits=12, sum_mode=Threshold(2)))
    assert same(plain, hidden)


@pytest.mark.optimised
@pytest.mark.parametrize("compression", drilled("top-mask"))
def test_one_device_and_two_end_in_the_same_bytes(federate, compression):
    one, two = (
        run(federate(compression=compression, value_bits=12, devices=jax.devices()[:count]))[0]
        for count in (1, 2)
    )
    assert same(one, two)


def test_sending_everything_is_sending_without_compression(federate):
    with_it, _ = run(federate(compression=Compression(Identity())))
    without, _ = run(federate())
    for a, b in zip(jax.tree.leaves(with_it.server), jax.tree.leaves(without.server), strict=True):
        assert np.array_equal(a, b)


def test_all_fragments_in_turn_are_the_whole_with_memory(federate):
    """What a layer did not say while it was not its turn, it says when it is."""
    federation = federate(compression=Compression(Fragment(3), error_feedback=True), rounds=6)
    state, _ = run(federation, 6)
    memory = state.clients.memory
    (name, *_) = memory.message
    # After round 6 the third fragment has just been sent: nothing of it is left but rounding.
    step = federation._programs[0].codecs[0].step
    assert np.max(np.abs(memory.message[name]["b"][:, 2])) <= step
    assert np.max(np.abs(memory.message[name]["b"][:, 0])) > 10 * step


def test_messages_have_the_bytes_that_are_counted(federate):
    whole = federate()
    quarter = federate(compression=Compression(RandomMask(one_in=4)), value_bits=8)
    _, (report, *_) = run(quarter, 1)
    codec = quarter._programs[0].codecs[0]
    assert codec.size < 0.3 * whole.parameters
    assert {cloud.uplink_bytes for cloud in report.clouds.values()} == {codec.size}
    back = federate(compression=Compression(RandomMask(one_in=4), broadcast="sum"), value_bits=8)
    _, (report, *_) = run(back, 1)
    # 2 x 3 x 127 + 1 values take 10 bits.
    assert {cloud.downlink_bytes for cloud in report.clouds.values()} == {-(-codec.size * 10 // 8)}


def test_four_bits_do_with_memory_what_many_do(federate):
    """At four bits the first message is crude; the memory makes good for it."""
    rule = FfaLora(optax.sgd(1.0))
    exact = federate(rule=rule, rounds=16)
    few = federate(
        rule=rule,
        rounds=16,
        value_bits=4,
        update_bound=0.5,
        compression=Compression(Rotated(), error_feedback=True, rounding="stochastic"),
    )
    losses = []
    for federation in (exact, few):
        state, _ = run(federation, 16)
        losses.append(sum(federation.evaluate(state).values()))
    before = sum(exact.evaluate(exact.init()).values())
    assert before - losses[1] > 0.7 * (before - losses[0]) > 0


@pytest.mark.parametrize("unit", ["example", "client"])
def test_private_messages_are_compressed(federate, unit):
    compression = Compression(Rotated(), error_feedback=unit == "example", rounding="stochastic")
    federation = federate(unit, compression=compression, value_bits=10)
    state, _ = run(federation)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.server.adapter))
    if unit == "client":
        codec = federation._programs[0].codecs[0]
        assert codec.strict and codec.room < codec.max_norm == federation.plan.clip_norm


def test_a_client_that_is_offline_keeps_its_memory(federate, make_participants):
    federation = federate(
        participants=make_participants(west=frozenset({2})), compression=EACH[1], value_bits=12
    )
    first, _ = federation.run_round(federation.init())
    second, _ = federation.run_round(first)
    for before, after in zip(
        jax.tree.leaves(first.clients.memory), jax.tree.leaves(second.clients.memory), strict=True
    ):
        assert np.array_equal(before[2], after[2])
        assert not np.array_equal(before[0], after[0])


SCAFFOLD = LocalTraining(optax.adam(0.02), 2, 6, 4, None, Drift(control=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": RULES["fedask"](optax.sgd(1.0))}, "adds one message of the same shape"),
        ({"rule": RULES["rolora"](optax.sgd(1.0))}, "adds one message of the same shape"),
        ({"combine": NormalisedMean()}, "adds one message of the same shape"),
        ({"training": SCAFFOLD}, "control variates"),
        ({"rule": RULES["fedsvd"](optax.sgd(1.0))}, "new coordinates"),
        ({"unit": "client", "compression": Compression(PowerSgd(rank=1))}, "opens 2 sums"),
        (
            {"unit": "client", "compression": Compression(Identity(), broadcast="sum")},
            "the clients would receive it without",
        ),
        ({"schedule": FedBuff(2), "compression": EACH[2]}, "before that"),
        (
            {"compression": Compression(Rotated(), rounding="stochastic"), "value_bits": 20},
            r"bits of stochastic rounding must be in \[2, 16\], got 20",
        ),
        (
            {
                "unit": "client",
                "compression": Compression(Identity(), rounding="stochastic"),
                "value_bits": 4,
            },
            "rotate the message first",
        ),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(federate, changes, words):
    settings = {"compression": EACH[1]} | changes
    with pytest.raises((Refused, UserError), match=words) as caught:
        federate(settings.pop("unit", "none"), **settings)
    assert "\n" not in str(caught.value)


def test_a_memory_that_would_grow_is_refused():
    with pytest.raises(Refused, match="error feedback"):
        Compression(RandomMask(one_in=4, unbiased=True), error_feedback=True)
