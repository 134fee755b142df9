"""Schedules that really train: against a Python loop, under every sum, with privacy, refused."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES, FfaLora
from fedjax_llm.clouds import Cloud, Compute, Link
from fedjax_llm.clouds.schedules import (
    Deadline,
    Decoupled,
    FedBuff,
    Schedule,
    Streaming,
    Synchronous,
)
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import (
    Compression,
    Federation,
    FederationState,
    Participant,
    Threshold,
)
from fedjax_llm.training import Drift, LocalTraining

# Of unequal speed, so that the fast ones come round twice before the slow one is through.
SPEED = {"north": 4000.0, "south": 1500.0, "west": 350.0}
ASYNCHRONOUS = [
    FedBuff(2),
    Streaming(1, mixing=0.25),
    Streaming(3, overlap=True, mixing=0.5),
    Decoupled(2, 2, 0.5),
]


def drilled(*tested: str) -> list:
    """`ASYNCHRONOUS`; of those that are not named the rest is drilled."""
    return [
        pytest.param(
            one, id=repr(one), marks=[] if repr(one).startswith(tested) else [pytest.mark.drill]
        )
        for one in ASYNCHRONOUS
    ]


def unequal(clouds: list[Participant], mbps: float = 50.0) -> list[Participant]:
    """The clouds with the speeds of `SPEED`."""
    return [
        dataclasses.replace(
            own,
            cloud=Cloud(
                own.cloud.name,
                Link(up_mbps=mbps, down_mbps=mbps, latency_ms=0.0),
                Compute(tokens_per_second=SPEED[own.cloud.name]),
            ),
        )
        for own in clouds
    ]


@pytest.fixture
def build(federate, make_participants):
    def made(schedule: Schedule, **changes: Any) -> Federation:
        changes.setdefault("participants", unequal(make_participants()))
        return federate(schedule=schedule, **changes)

    return made


def run(federation: Federation, rounds: int = 4) -> tuple[FederationState, list]:
    state, reports = federation.init(), []
    for after, report in federation.rounds(state, rounds):
        state = after
        reports.append(report)
    return state, reports


def part(state: FederationState) -> dict[str, np.ndarray]:
    """The side that FFA trains, by projection [L, ...]."""
    return {name: np.array(f.b_LxRxF) for name, f in state.server.adapter.factors.items()}


@pytest.fixture(scope="module")
def synchronous(federate) -> FederationState:
    """The state after four rounds in which all wait; not optimised."""
    return run(federate())[0]


@pytest.mark.parametrize("schedule", [Synchronous(), Deadline(1e6, 2)], ids=repr)
def test_a_deadline_that_nobody_misses_is_a_synchronous_round(build, synchronous, schedule):
    state, reports = run(build(schedule))
    for name, values in part(state).items():
        assert np.array_equal(values, part(synchronous)[name])
    assert all(report.clouds[name].online for report in reports for name in SPEED)


def test_a_late_cloud_costs_its_own_part_only(build, federate, make_participants):
    """The slow cloud misses every deadline: the run is the one in which it is never there."""
    state, reports = run(build(Deadline(0.4, 2)))
    gone = federate(participants=make_participants(west=frozenset(range(1, 9))))
    other, _ = run(gone)
    for name, values in part(state).items():
        assert np.array_equal(values, part(other)[name])
    assert [report.clouds["west"].uplink_bytes for report in reports] == [0] * 4


def test_one_fragment_of_fresh_replicas_is_a_synchronous_round(build, synchronous):
    """A replica that takes the global values as they are begins where the others begin."""
    state, _ = run(build(Streaming(1, mixing=0.0)))
    for name, values in part(state).items():
        np.testing.assert_allclose(values, part(synchronous)[name], rtol=0, atol=2e-6)


@pytest.mark.optimised
def test_a_buffer_of_all_is_a_synchronous_round(build, federate):
    state, _ = run(build(FedBuff(3)))
    plain, _ = run(federate())
    for name, values in part(state).items():
        assert np.array_equal(values, part(plain)[name])


def test_fragments_take_turns(build):
    federation = build(Streaming(3))
    state = federation.init()
    for number in range(1, 5):
        before = part(state)
        state, _ = federation.run_round(state)
        for name, values in part(state).items():
            changed = [not np.array_equal(a, b) for a, b in zip(values, before[name], strict=True)]
            assert changed == [layer == (number - 1) % 3 for layer in range(3)]


def test_momentum_of_other_fragments_rests(build):
    momentum = FfaLora(optax.sgd(1.0, momentum=0.9, nesterov=True))
    federation = build(Streaming(3), rule=momentum, rounds=6)
    state = federation.init()
    for number in range(1, 7):
        before = part(state)
        state, _ = federation.run_round(state)
        moved = {
            layer
            for name, values in part(state).items()
            for layer in range(3)
            if not np.array_equal(values[layer], before[name][layer])
        }
        assert moved == {(number - 1) % 3}


def test_buffered_messages_are_those_of_their_versions(build):
    """Oracle: each message trained by hand from the version it names, weighed, added, applied."""
    federation = build(FedBuff(2), rounds=6)
    state, _ = run(federation, 6)
    timeline = federation.calendar.timeline
    assert timeline.most_behind >= 2
    codec = federation._programs[0].codecs[0]

    alone = build(FedBuff(2), rounds=6)  # its programs, fed by hand
    first = alone.init()
    own = first.clients
    versions = [first]
    messages: dict[int, np.ndarray] = {}
    for step in range(1, 7):
        server = versions[step - 1]
        for wave, places in zip(alone.calendar.waves(step), timeline.waves(step - 1), strict=True):
            inputs = alone.roster.wave_inputs(own, wave)
            local, message = alone._programs[0].train_and_send(
                alone._base, alone.layout.replicate(server.globals), inputs, alone._seed,
                np.int32(step),
            )  # fmt: skip
            own = jax.tree.map(lambda leaf: leaf[:3], local.state)
            for cloud, place in places.items():
                behind = timeline.cycle(place).lands - step
                assert wave.factor_K[cloud] == np.float32((1 + behind) ** -0.5)
                messages[place] = np.array(message.ints_P[cloud])
        total = sum(messages[place] for place in timeline.landing(step).values())
        mean_P = total.astype(np.float32) * np.float32(codec.step) * np.float32(0.5)
        moved = codec.unravel(mean_P).message
        factors = {
            name: old._replace(b_LxRxF=old.b_LxRxF + moved[name]["b"])
            for name, old in server.server.adapter.factors.items()
        }
        adapter = dataclasses.replace(server.server.adapter, factors=factors)
        versions.append(server._replace(server=server.server._replace(adapter=adapter)))
    for name, values in part(state).items():
        np.testing.assert_allclose(values, part(versions[-1])[name], rtol=1e-6, atol=1e-7)


@pytest.mark.optimised
@pytest.mark.parametrize("schedule", drilled("Decoupled"))
def test_plain_and_encrypted_end_in_the_same_bytes(build, schedule, make_participants):
    # Encrypted messages are longer: over links that feel it they would land elsewhere.
    clouds = unequal(make_participants(), mbps=1e9)
    plain, _ = run(build(schedule, participants=clouds))
    hidden, reports = run(build(schedule, sum_mode=Threshold(2), participants=clouds))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(hidden), strict=True):
        assert np.array_equal(a, b)
    for number, report in enumerate(reports, 1):
        assert sum(cloud.uplink_bytes > 0 for cloud in report.clouds.values()) >= 2, number


@pytest.mark.optimised
@pytest.mark.parametrize("schedule", drilled("Streaming(fragments=3"))
def test_one_device_and_two_end_in_the_same_bytes(build, schedule):
    one, _ = run(build(schedule, devices=jax.devices()[:1]), 3)
    two, _ = run(build(schedule, devices=jax.devices()[:2]), 3)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("schedule", drilled("Decoupled"))
def test_a_run_that_stops_goes_on_with_what_is_under_way(build, schedule):
    first, again = build(schedule), build(schedule)
    whole, half = run(first, 4)[0], run(first, 2)[0]
    for _ in range(2):
        half, _ = again.run_round(jax.device_get(half))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(half), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("schedule", drilled("FedBuff"))
def test_the_loss_falls(build, schedule):
    federation = build(schedule, rounds=12)
    state, _ = run(federation, 12)
    before, after = federation.evaluate(federation.init()), federation.evaluate(state)
    # That of the slow cloud, which few messages are of, may not.
    assert sum(after.values()) < 0.995 * sum(before.values())


def test_virtual_time_and_money_follow_from_profiles(build):
    federation = build(Synchronous())
    _, reports = run(federation, 2)
    steps = federation.calendar.timeline.steps
    assert [report.seconds_virtual for report in reports] == [
        steps[0].ready,
        steps[1].ready - steps[0].ready,
    ]
    # 2 steps of 6 rows of 24 positions.
    assert reports[0].clouds["west"].seconds_train == pytest.approx(288 / 350)
    assert reports[0].seconds_virtual >= 288 / 350


@pytest.mark.parametrize("schedule", drilled("Decoupled"))
def test_examples_are_private_whenever_their_message_lands(build, schedule):
    """The plan counts the cycles that a cloud begins; a plan of fewer is refused."""
    enough = build(schedule, unit="example", rounds=40, steps=4)
    cycles = enough.spending.rounds(4)
    state, _ = run(enough)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part(state)))
    if cycles > 1:
        with pytest.raises(Refused, match=f"plan for {cycles} rounds"):
            build(schedule, unit="example", rounds=cycles - 1, steps=4)


def test_noise_of_a_cycle_is_not_used_again(build):
    federation = build(Decoupled(2, 2), unit="example", rounds=40, steps=8)
    turns = [
        (cloud, int(wave.turn_K[cloud]))
        for step in range(1, 9)
        for wave in federation.calendar.waves(step)
        for cloud in np.flatnonzero(wave.trains_K)
    ]
    assert len(turns) == len(set(turns))


def test_clients_are_private_without_a_sample(build):
    state, _ = run(build(FedBuff(2), unit="client"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part(state)))
    with pytest.raises(Refused, match="no amplification holds"):
        build(FedBuff(2), unit="client", rate=0.5)


def test_a_secret_sample_moves_neither_divisor_nor_who_lands(build):
    """Plain sum, clients sampled at random, nothing learned: what is left is noise of one size."""
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    moved, sampled = [], set()
    for seed in range(4):
        federation = build(
            Synchronous(), unit="client", rate=0.5, training=still, seed=seed, rounds=4
        )
        size = federation._programs[0].codecs[0].size
        for state, report in federation.rounds(federation.init(), 4):
            sampled.add(int(federation.roster.selected(report.round).sum()))
            assert sum(cloud.lands for cloud in report.clouds.values()) == 3
            moved.append(report.update_norm / np.sqrt(size))
            del state
    # A round without anybody is one of them.
    assert {0, 1, 2} <= sampled
    plan = federation.plan
    expected = plan.noise_stddev / (3 * 0.5)
    assert np.allclose(moved, expected, rtol=0.2)


def test_fragments_are_no_way_round_integer_noise(build):
    """Messages in fragments carry no integer noise: the plan that counts on it is refused."""
    from fedjax_llm.federation.link_promises import Promise, check_compression, in_fragments

    promise = Promise("client", False, False, False, False, True, False)
    shortened = in_fragments(None, Streaming(3))
    assert shortened is not None and in_fragments(None, Streaming(1)) is None
    with pytest.raises(Refused, match="integer noise"):
        check_compression(
            shortened, promise, rule=FfaLora(optax.sgd(1.0)), combined=False, control=False
        )


def test_a_replica_and_a_memory_do_not_say_the_same_twice(build):
    """Nothing is lost but rounding: with a memory the run is the one without."""
    with_memory, _ = run(
        build(Streaming(3, mixing=0.5), compression=Compression(error_feedback=True))
    )
    without, _ = run(build(Streaming(3, mixing=0.5)))
    for name, values in part(with_memory).items():
        np.testing.assert_allclose(values, part(without)[name], rtol=0, atol=2e-5)


TWO = {"training": LocalTraining(optax.adam(0.02), 2, 6, 4, None, Drift(control=True))}


@pytest.mark.parametrize(
    ("schedule", "changes", "words"),
    [
        (FedBuff(2), {"rule": RULES["rolora"](optax.sgd(1.0))}, "a rule of one phase"),
        (Streaming(2), {"rule": RULES["fedask"](optax.sgd(1.0))}, "a rule of one phase"),
        (Decoupled(1), {"rule": RULES["flora"](optax.sgd(1.0))}, "messages"),
        (FedBuff(2), TWO, "no control variates"),
        (FedBuff(1), {"sum_mode": Threshold(2)}, "no sum of fewer than 2"),
        (Decoupled(1), {"sum_mode": Threshold(2)}, "no sum of fewer than 2"),
        (Deadline(5.0, 1), {"sum_mode": Threshold(2)}, "no sum of fewer than 2"),
        (Deadline(5.0, 4), {}, "quorum = 4 is more than the 3 clouds"),
        (Streaming(4), {}, "4 fragments need as many layers"),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(build, schedule, changes, words):
    with pytest.raises((Refused, UserError), match=words) as caught:
        build(schedule, **changes)
    assert "\n" not in str(caught.value)


def test_offline_rounds_belong_to_rounds(build, make_participants):
    with pytest.raises(UserError, match="availability instead of offline_rounds"):
        build(FedBuff(2), participants=make_participants(west=frozenset({2})))


def test_a_run_of_overlapping_steps_cannot_be_prolonged(build):
    federation = build(FedBuff(2), rounds=2)
    state, _ = run(federation, 2)
    with pytest.raises(UserError, match="planned for 2 rounds"):
        federation.run_round(state)


def with_side(server: Any, values: dict[str, np.ndarray]) -> Any:
    factors = {
        name: old._replace(b_LxRxF=jax.numpy.asarray(values[name]))
        for name, old in server.adapter.factors.items()
    }
    return server._replace(adapter=dataclasses.replace(server.adapter, factors=factors))


@pytest.mark.parametrize("schedule", drilled("Streaming(fragments=3")[1:])
def test_replicas_go_on_from_what_they_have(build, federate, schedule):
    """Oracle: every cycle mixed by hand, then trained from there by a federation without replicas.

    The timeline says who begins with which version; layer l is of fragment l mod P; a fragment has
    come back if a step between the client's last version and this one was its turn.
    """
    federation = build(schedule, rounds=6)
    plain = federate(rounds=6)
    timeline, names = federation.calendar.timeline, federation.names
    state = federation.init()
    versions = [part(state)]
    replica: dict[int, dict[str, np.ndarray]] = {}
    last: dict[int, int] = {}
    turns = dict.fromkeys(range(3), 0)
    own = plain.init().clients
    checked = 0
    for step in range(1, 7):
        after, _ = federation.run_round(state)
        for wave in timeline.waves(step - 1):
            for cloud, place in wave.items():
                cycle = timeline.cycle(place)
                assert cycle.version == step - 1
                turns[cloud] += 1  # nobody fails here, so that every cycle that runs is counted
                received = versions[cycle.version]
                start = {name: values.copy() for name, values in received.items()}
                if not cycle.fresh:
                    back = {(s - 1) % schedule.fragments for s in range(last[cloud] + 1, step)}
                    for name, values in replica[cloud].items():
                        for layer in range(3):
                            mixed = schedule.mixing * values[layer]
                            mixed = mixed + (1 - schedule.mixing) * received[name][layer]
                            here = layer % schedule.fragments in back
                            start[name][layer] = mixed if here else values[layer]
                inputs = plain.roster.inputs(own, turns[cloud], np.arange(3) == cloud)
                begun = state.globals._replace(server=with_side(state.server, start))
                local = plain._programs[0].train(
                    plain._base, plain.layout.replicate(begun), inputs, plain._seed, np.int32(step)
                )
                own = jax.tree.map(lambda leaf: leaf[:3], local.state)
                replica[cloud] = {
                    name: np.array(sides["b"][cloud]) for name, sides in local.after.items()
                }
                last[cloud] = cycle.version
        for cloud in {cloud for wave in timeline.waves(step - 1) for cloud in wave}:
            for name, values in replica[cloud].items():
                found = np.array(after.clients.replica[name]["b"][cloud])
                np.testing.assert_allclose(found, values, rtol=0, atol=3e-6, err_msg=names[cloud])
                checked += 1
        state = after
        versions.append(part(state))
    assert checked >= 12
