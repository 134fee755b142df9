"""What a round promises about privacy, read off the round itself and not off its description."""

from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import RULES
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, Plain, Purpose, SumMode, Threshold, key_for
from fedjax_llm.federation.keys import seed_key
from fedjax_llm.training import ExamplePrivacy, LocalTraining

Build = Callable[..., Federation]
WILD = LocalTraining(optax.sgd(1e30, momentum=0.9), 2, 6, 4)


def messages(federation: Federation) -> np.ndarray:
    """The decoded messages of round 1, exact in float64, [K, P]."""
    state = federation.init()
    _, message = federation._programs[0].train_and_send(
        federation._base,
        federation.layout.replicate(state.globals),
        federation.roster.inputs(state.clients, 1, np.ones(len(federation.names), bool)),
        federation._seed,
        jnp.int32(1),
    )
    ints_KxP = np.asarray(message.ints_P)[: len(federation.names)]
    return ints_KxP.astype(np.float64) * federation._programs[0].codecs[0].fixed_point.step


# Those whose sum can carry the noise of unit client.
NOISED = sorted(
    name
    for name, rule in RULES.items()
    if rule.stages == 1
    and not (rule.needs_individual_messages or rule.weighs_by_result or rule.kept)
)


@pytest.mark.parametrize("rule", NOISED)
@pytest.mark.parametrize("rate", [1.0, 1e4, 1e30])
def test_a_message_as_sent_is_never_longer_than_the_clip_norm(
    federate: Build, rule: str, rate: float
) -> None:
    """Unit client: after rounding, over all trained factors together, whatever was computed."""
    training = LocalTraining(optax.sgd(rate), 2, 6, 4)
    sent_KxP = messages(federate("client", training=training, rule=RULES[rule](optax.sgd(1.0))))
    norms_K = np.linalg.norm(sent_KxP, axis=1)
    assert np.all(norms_K <= 0.1)
    # Diverged or not, but in the finite cases the bound is what stops the message.
    assert np.all(norms_K > 0.0999) if rate == 1e4 else True


@pytest.mark.parametrize("mode", [Plain(), Threshold(2)])
def test_divergence_stops_no_round_of_unit_client(federate: Build, mode: SumMode) -> None:
    """An error would name a cloud to the world; zeros are within the bound like any update."""
    federation = federate("client", training=WILD, sum_mode=mode)
    start = federation.init()
    state, report = federation.run_round(start)
    assert report.clouds_diverged == 3
    changes = [
        np.ravel(after - before)
        for before, after in zip(
            jax.tree.leaves(start.server.adapter),
            jax.tree.leaves(state.server.adapter),
            strict=True,
        )
    ]
    noise = np.concatenate([change for change in changes if np.any(change)])
    # Nothing but the noise on the sum of three; five standard errors.
    assert abs(noise.std() / (0.7 * 0.1 / 3) - 1) < 5 / np.sqrt(2 * noise.size)
    # The clouds go on with the moments they had: one bad round does not silence a cloud for good.
    for before, after in zip(
        jax.tree.leaves(start.clients), jax.tree.leaves(state.clients), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_divergence_is_an_error_where_it_follows_from_noised_sums(federate: Build) -> None:
    training = LocalTraining(optax.sgd(1e38, momentum=0.9), 2, 6, 4, ExamplePrivacy(0.5, 0.8))
    federation = federate("example", training=training)
    with pytest.raises(UserError, match="is not finite"):
        federation.run_round(federation.init())


def test_sound_rounds_report_no_divergence(federate: Build) -> None:
    federation = federate("client")
    _, report = federation.run_round(federation.init())
    assert report.clouds_diverged == 0


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_round_beyond_the_plan_is_refused(federate: Build, unit: str) -> None:
    """The epsilon that was printed covers the planned rounds and no more."""
    federation = federate(unit, rounds=1)
    state, _ = federation.run_round(federation.init())
    with pytest.raises(Refused, match="round 2: the privacy plan accounts for 1 rounds"):
        federation.run_round(state)


def test_rounds_without_a_promise_have_no_end(federate: Build) -> None:
    federation = federate("none", rounds=1)
    *_, (state, _) = federation.rounds(federation.init(), 2)
    assert int(state.round) == 2


def test_no_two_draws_share_a_key() -> None:
    """Over purposes, rounds, clients, local steps, and the leaves that a step's noise splits to."""
    seed = seed_key(3)
    drawn = [key_for(seed, Purpose.ADAPTER_INIT)]
    for round_index in range(1, 6):
        drawn.append(key_for(seed, Purpose.CLIENT_SAMPLING, round_index))
        drawn.extend(jax.random.split(key_for(seed, Purpose.SERVER_NOISE, round_index), 3))
        for client, step in product(range(5), range(4)):
            where = (round_index, client)
            sampling = key_for(seed, Purpose.EXAMPLE_SAMPLING, *where)
            noise = key_for(seed, Purpose.LOCAL_NOISE, *where)
            drawn.append(jax.random.fold_in(sampling, step))
            drawn.extend(jax.random.split(jax.random.fold_in(noise, step), 3))
    words = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in drawn}
    assert len(words) == len(drawn)


def test_seeds_that_differ_in_their_upper_half_differ() -> None:
    def words(key: jax.Array) -> list[int]:
        return np.asarray(jax.random.key_data(key)).tolist()

    assert words(seed_key(7)) == words(jax.random.key(7))
    assert words(seed_key(2**32 + 7)) != words(seed_key(7))
    assert words(seed_key(2**63 - 1)) == [2**31 - 1, 2**32 - 1]
