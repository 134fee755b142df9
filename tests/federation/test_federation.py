"""The round as a whole: bytes that do not depend on devices, sum or interruption; refusals."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import (
    Bfv,
    Ckks,
    Federation,
    FederationState,
    Masked,
    Participant,
    Plain,
    SumMode,
    Threshold,
)
from fedjax_llm.federation.client_values import ClientState
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import ExamplePrivacy, LocalTraining

HIDDEN = [Masked(), Threshold(2), Bfv(2), Ckks(2)]

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]


def run(federation: Federation, rounds: int = 2) -> FederationState:
    *_, (state, _) = federation.rounds(federation.init(), rounds)
    return state


def same_bytes(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


@pytest.fixture(scope="module")
def plain_bytes(federate: Build) -> Callable[[str], FederationState]:
    """The state after two rounds of a plain sum on two devices, by privacy unit; optimised."""
    return functools.cache(
        lambda unit: run(federate(unit, sum_mode=Plain(), devices=jax.devices()[:2]))
    )


@pytest.mark.optimised
@pytest.mark.parametrize("unit", ["none", "example", "client"])
def test_one_device_and_two_give_the_same_bytes(
    federate: Build, plain_bytes: Callable[[str], FederationState], unit: str
) -> None:
    devices = jax.devices()
    assert len(devices) >= 2
    assert same_bytes(run(federate(unit, devices=devices[:1])), plain_bytes(unit))


@pytest.mark.optimised
def test_the_size_of_a_group_changes_rounding_only(
    federate: Build, plain_bytes: Callable[[str], FederationState]
) -> None:
    """Batching clients is an arrangement of the same arithmetic; there each runs alone."""
    alone = plain_bytes("example")
    together = run(federate("example", clients_at_once=3, devices=jax.devices()[:1]))
    for a, b in zip(jax.tree.leaves(alone.server), jax.tree.leaves(together.server), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def mode_name(mode: SumMode) -> str:
    return type(mode).__name__.lower()


@pytest.mark.optimised
@pytest.mark.parametrize("mode", HIDDEN, ids=mode_name)
@pytest.mark.parametrize("unit", ["none", "example", "client"])
def test_every_sum_gives_the_same_bytes(
    federate: Build, plain_bytes: Callable[[str], FederationState], unit: str, mode: SumMode
) -> None:
    assert same_bytes(plain_bytes(unit), run(federate(unit, sum_mode=mode)))


@pytest.mark.each_rule
@pytest.mark.parametrize("name", sorted(RULES))
def test_training_lowers_held_out_loss_in_every_cloud(federate: Build, name: str) -> None:
    training = LocalTraining(optax.adam(0.05), 4, 6, 4)
    federation = federate(rule=RULES[name](optax.sgd(1.0)), training=training, update_bound=10.0)
    before = federation.evaluate(federation.init())
    after = federation.evaluate(run(federation, 6))
    assert all(after[cloud] < before[cloud] - 0.01 for cloud in before)


def test_a_state_can_be_taken_up_by_another_process(federate: Build) -> None:
    """What a checkpoint stores is all there is: two rounds equal one and one."""
    here = federate("example")
    whole, first = run(here, 2), run(here, 1)
    stored = jax.tree.map(np.asarray, first)
    second, _ = federate("example").run_round(stored)
    assert same_bytes(whole, second)


def test_other_seeds_give_other_adapters(federate: Build) -> None:
    assert not same_bytes(run(federate(seed=3), 1).server, run(federate(seed=4), 1).server)


@pytest.fixture(scope="module")
def plain_rounds(
    federate: Build, make_participants: Clouds
) -> tuple[FederationState, FederationState]:
    """The state after a round of a plain sum: with all three clouds, and without the second."""
    without = federate(participants=make_participants(south=frozenset({1})), sum_mode=Plain())
    return run(federate(), 1), run(without, 1)


@pytest.mark.parametrize("mode", HIDDEN, ids=mode_name)
def test_a_cloud_that_is_offline_costs_only_its_own_contribution(
    federate: Build,
    make_participants: Clouds,
    plain_rounds: tuple[FederationState, FederationState],
    mode: SumMode,
) -> None:
    """The other two go on, and end where they would have ended without it."""
    lost = federate(participants=make_participants(south=frozenset({1})), sum_mode=mode)
    state, report = lost.run_round(lost.init())
    assert not report.clouds["south"].online
    assert report.clouds["south"].uplink_bytes == report.clouds["south"].rows == 0
    assert report.clouds["north"].uplink_bytes > 0
    of_all, of_two = plain_rounds
    assert not same_bytes(state.server, of_all.server)
    again, second = lost.run_round(state)
    assert second.clouds["south"].online and int(again.round) == 2
    assert same_bytes(state.server, of_two.server)


def test_too_few_clouds_online_is_refused_and_changes_nothing(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = make_participants(south=frozenset({1}), west=frozenset({1}))
    federation = federate(participants=clouds, sum_mode=Threshold(2))
    state = federation.init()
    stages: list[str] = []
    with pytest.raises(Refused, match="needs 2 of 3"):
        federation.run_round(state, on_stage=stages.append)
    assert stages == []  # nobody trained in vain
    assert same_bytes(state, federation.init())


def test_fewer_clouds_than_a_sum_may_have_are_refused_before_they_train(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = make_participants(south=frozenset({1}))
    federation = federate(participants=clouds, sum_mode=Threshold(2, minimum_clients=3))
    stages: list[str] = []
    with pytest.raises(Refused, match="at least 3 clients, 2 sent"):
        federation.run_round(federation.init(), on_stage=stages.append)
    assert stages == []


@pytest.mark.parametrize("mode", HIDDEN, ids=mode_name)
def test_what_leaves_a_client_is_ciphertext(
    federate: Build, monkeypatch: pytest.MonkeyPatch, mode: SumMode
) -> None:
    """The bytes that cross the boundary hold no run of the plaintext integers, and never repeat."""
    federation = federate(sum_mode=mode)
    secure = federation._hidden and federation._hidden.first
    assert secure is not None
    crossed: dict[str, tuple[np.ndarray, bytes]] = {}
    honest = secure.upload

    def spy(client: str, round_number: int, ints_P: jax.Array) -> Iterator[bytes]:
        chunks = list(honest(client, round_number, ints_P))
        crossed[client] = (np.asarray(ints_P), b"".join(chunks))
        return iter(chunks)

    monkeypatch.setattr(secure, "upload", spy)
    _, report = federation.run_round(federation.init())
    assert set(crossed) == set(federation.names)
    for name, (ints_P, data) in crossed.items():
        assert len(data) == secure.upload_bytes(name) <= report.clouds[name].uplink_bytes
        telling = ints_P[np.abs(ints_P) > 256]
        assert telling.size > 50
        for dtype in ("<i4", "<i8", ">i4", "<f4"):
            pairs = telling[:64].astype(dtype)
            hits = sum(data.count(pairs[k : k + 2].tobytes()) for k in range(0, 64, 2))
            assert hits == 0
        again = b"".join(honest(name, 2, ints_P))
        nothing = b"".join(honest(name, 3, jnp.zeros_like(ints_P)))
        half = min(len(data), len(again), len(nothing)) // 2
        ours, theirs, empty = (np.frombuffer(d[half:-64], np.uint8) for d in (data, again, nothing))
        # Equal bytes at a rate of 1 in 256, as for independent uniform ones; six standard errors.
        size = min(ours.size, theirs.size)
        rate = np.mean(ours[:size] == theirs[:size])
        assert abs(rate - 1 / 256) < 6 * np.sqrt(1 / 256 / size)
        # Bytes come up as often as in a message of zeros, whatever their law is.
        histogram, of_zeros = (np.bincount(part, minlength=256) for part in (ours, empty))
        apart = histogram / ours.size - of_zeros / empty.size
        error = np.sqrt(histogram / ours.size**2 + of_zeros / empty.size**2)
        assert (np.abs(apart) <= 6 * error).all()
        if not isinstance(mode, Ckks):
            # CKKS's library writes residues below a prime, among which small bytes come up more.
            assert np.abs(histogram - histogram.mean()).max() < 6 * np.sqrt(histogram.mean())


@pytest.mark.parametrize("mode", HIDDEN, ids=mode_name)
def test_the_time_and_bytes_of_a_sum_are_all_counted(
    federate: Build, monkeypatch: pytest.MonkeyPatch, mode: SumMode
) -> None:
    """Making chunks is encryption, the rest up to the last chunk addition, what follows opening."""
    federation = federate(sum_mode=mode)
    secure = federation._hidden and federation._hidden.first
    assert secure is not None
    honest = secure.upload

    def slow(client: str, round_number: int, ints_P: jax.Array) -> Iterator[bytes]:
        chunks = honest(client, round_number, ints_P)

        def waiting() -> Iterator[bytes]:
            time.sleep(0.2)
            yield from chunks

        return waiting()

    monkeypatch.setattr(secure, "upload", slow)
    federation.run_round(federation.init())
    started = time.perf_counter()
    _, report = federation.run_round(federation.init()._replace(round=np.int32(1)))
    spent = time.perf_counter() - started
    assert report.seconds["encrypt"] >= 0.6
    assert all(report.seconds[stage] > 0 for stage in ("add", "decrypt"))
    assert sum(report.seconds.values()) <= spent
    opening = {
        name: cloud.uplink_bytes - secure.upload_bytes(name)
        for name, cloud in report.clouds.items()
    }
    assert all(extra >= 0 for extra in opening.values())
    assert sum(extra > 0 for extra in opening.values()) >= 2  # two at least open a sum
    assert all(c.downlink_bytes >= 4 * federation.parameters for c in report.clouds.values())


def test_poisson_sampled_clients_send_encrypted_zeros(federate: Build) -> None:
    """Who was sampled is not visible in who sends: every online cloud sends as many bytes."""
    federation = federate("client", rate=0.5, sum_mode=Threshold(2), seed=5)
    rows_seen = set()
    for _, report in federation.rounds(federation.init(), 3):
        sizes = {cloud.uplink_bytes > 0 for cloud in report.clouds.values()}
        assert sizes == {True}
        rows_seen |= {cloud.rows > 0 for cloud in report.clouds.values()}
    assert rows_seen == {True, False}


def test_client_noise_is_on_the_sum_at_the_stated_scale(federate: Build) -> None:
    """With a learning rate of zero the change of the adapter is the noise alone."""
    still = LocalTraining(optax.sgd(0.0), 2, 6, 4)
    federation = federate("client", training=still, lora=federate().lora)
    state, _ = federation.run_round(federation.init())
    before = jax.tree.leaves(federation.init().server.adapter)
    after = jax.tree.leaves(state.server.adapter)
    changes = [np.ravel(a - b) for a, b in zip(after, before, strict=True)]
    noise = np.concatenate([c for c in changes if np.any(c)])
    expected = 0.7 * 0.1 / 3  # noise multiplier x clip norm on the sum, divided by three clouds
    # The standard error of a standard deviation is sigma / sqrt(2 n); five of them.
    assert abs(noise.std() / expected - 1) < 5 / np.sqrt(2 * noise.size)


def test_a_plan_that_counts_other_examples_is_refused(federate: Build) -> None:
    plan = PrivacyPlan.for_examples(
        [200, 320, 260],
        expected_batch=6,
        steps_per_round=2,
        rounds=4,
        clip_norm=0.5,
        noise_multiplier=0.8,
        delta=1e-3,
    )
    with pytest.raises(Refused, match="the plan counts"):
        federate("example", plan=plan)


@pytest.mark.parametrize(
    ("training", "match"),
    [
        (LocalTraining(optax.sgd(0.1), 3, 6, 4, ExamplePrivacy(0.5, 0.8)), "samples by"),
        (LocalTraining(optax.sgd(0.1), 2, 8, 4, ExamplePrivacy(0.5, 0.8)), "samples by"),
        (LocalTraining(optax.sgd(0.1), 2, 6, 4, ExamplePrivacy(0.6, 0.8)), "clips and noises"),
        (LocalTraining(optax.sgd(0.1), 2, 6, 4, ExamplePrivacy(0.5, 0.7)), "clips and noises"),
        (LocalTraining(optax.sgd(0.1), 2, 6, 4), "does not clip"),
    ],
)
def test_training_that_differs_from_the_plan_is_refused(
    federate: Build, training: LocalTraining, match: str
) -> None:
    with pytest.raises(Refused, match=match):
        federate("example", training=training)


def test_weights_by_data_are_refused_for_unit_client(federate: Build) -> None:
    with pytest.raises(Refused, match="depend on the data of the client"):
        federate("client", weights=[1.0, 2.0, 3.0])


def test_a_rule_that_reads_single_messages_is_refused_under_encryption(federate: Build) -> None:
    nosy = [rule for rule in RULES.values() if rule.needs_individual_messages]
    assert nosy
    for rule in nosy:
        with pytest.raises(Refused, match="has to read each cloud's message"):
            federate(rule=rule(optax.sgd(1.0)), sum_mode=Threshold(2))


def test_diverged_training_is_an_error_that_names_the_cloud(federate: Build) -> None:
    wild = LocalTraining(optax.sgd(1e30), 2, 6, 4)
    federation = federate(training=wild)
    with pytest.raises(UserError, match=r"update of cloud '\w+' is not finite"):
        federation.run_round(federation.init())


def test_weights_scale_contributions(federate: Build) -> None:
    """Weights (1, 0.5, 0.5) are those of a mean: the same as (2, 1, 1)."""
    one = run(federate(weights=[1.0, 0.5, 0.5]), 1)
    two = run(federate(weights=[2.0, 1.0, 1.0]), 1)
    uniform = run(federate(), 1)
    assert same_bytes(one.server, two.server)
    assert not same_bytes(one.server, uniform.server)


def test_no_transfer_to_the_host_inside_the_program_of_a_round(federate: Build) -> None:
    federation = federate("example")
    state = federation.init()
    clients = federation.roster.inputs(state.clients, 1, np.ones(3, bool))
    server = federation.layout.replicate(state.globals)
    scalars = (federation._seed, np.int32(1), np.float32(3))
    seed, number, divisor = federation.layout.replicate(scalars)
    program = federation._programs[0].round
    carried, clients = clients.state, clients._replace(state=ClientState((), {}, ()))
    arguments = (federation._base, server, carried, clients, divisor, seed, number)
    jax.block_until_ready(program(*arguments))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(program(*arguments))


def test_the_base_model_is_an_argument_and_not_a_constant(federate: Build) -> None:
    federation = federate()
    state = federation.init()
    clients = federation.roster.inputs(state.clients, 1, np.ones(3, bool))
    program = federation._programs[0].train_and_send
    text = program.lower(
        federation._base, state.globals, clients, federation._seed, np.int32(1)
    ).as_text()
    largest = max(len(line) for line in text.splitlines() if "constant" in line)
    # A baked-in weight matrix of 32 x 48 would be printed with over ten thousand characters.
    assert largest < 4000
