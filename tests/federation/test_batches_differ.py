"""Batch sizes that differ by client: each trains, and is accounted for, as if it were alone.

Claimed, and tested here or in `training/test_batches_differ.py`:

- A client's update is that of a run in which all clients take its batch size, up to rounding.
- With example privacy a client samples at its own batch over its own rows, and its noised sum is
  divided by its own batch, a public number. The noise on the sum is calibrated to the clip norm
  alone. So its steps are Gaussian mechanisms at its own rate, which the plan composes client by
  client; what is stated is the largest epsilon.
- A plan whose rates are not those at which rows are drawn is refused, in either direction.
- Nothing else needs refusing. Correlated noise and an adaptive clip norm act on a client's own
  sums, before these are divided by a constant; turns are by steps; control variates are means of
  noised gradients; unit `client` clips the update whatever made it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, Participant
from fedjax_llm.federation.tables import client_tables, sampler_of
from fedjax_llm.federation.virtual import spent_in
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import ExamplePrivacy, LocalTraining

Build = Callable[..., Federation]
Clouds = Callable[..., list[Participant]]
OWN = (2, 6, 4)
PRIVATE = {"steps_per_round": 2, "rounds": 4, "clip_norm": 0.5, "noise_multiplier": 0.8}


def with_batches(clouds: list[Participant], sizes: Any = OWN) -> list[Participant]:
    return [
        dataclasses.replace(cloud, batch_size=size)
        for cloud, size in zip(clouds, sizes, strict=True)
    ]


def plan_of(clouds: list[Participant], batches: Any, **changes: Any) -> PrivacyPlan:
    units = [cloud.rows for cloud in clouds]
    settings = PRIVATE | {"expected_batch": batches, "delta": 1e-3} | changes
    return PrivacyPlan.for_examples(units, **settings)


def trained(federation: Federation) -> Any:
    """What each client holds after its local steps, before anything is summed."""
    state, count = federation.init(), len(federation.participants)
    inputs = federation.roster.inputs(state.clients, 1, np.ones(count, bool))
    where = (federation._seed, np.int32(1))
    local = federation._programs[0].train(
        federation._base, federation.layout.replicate(state.globals), inputs, *where
    )
    return jax.device_get((local.after, local.metrics.rows))


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("unit", "optimizer"),
    [
        pytest.param("none", optax.adam(2e-2), id="none-adam"),
        pytest.param("none", optax.sgd(0.5), id="none-sgd"),
        pytest.param("example", optax.adam(2e-2), id="example-adam"),
    ],
)
def test_one_device_and_two_give_the_same_bytes(
    federate: Build, make_participants: Clouds, unit: str, optimizer: optax.GradientTransformation
) -> None:
    clouds = with_batches(make_participants())
    private = ExamplePrivacy(0.5, 0.8) if unit == "example" else None
    training = LocalTraining(optimizer, 2, max(OWN), 4, private)

    def run(devices: int) -> Any:
        federation = federate(
            unit,
            rounds=6,
            participants=clouds,
            training=training,
            devices=jax.devices()[:devices],
            # Two groups on one device, and one on each of two: what XLA makes of them differs.
            clients_at_once=2,
            **({"plan": plan_of(clouds, OWN, rounds=6)} if private else {}),
        )
        *_, (state, _) = federation.rounds(federation.init(), 6)
        return jax.device_get(state)

    jax.tree.map(np.testing.assert_array_equal, run(1), run(2))


@pytest.mark.parametrize("unit", ["none", "example"])
def test_a_client_trains_as_if_all_took_its_batch_size(
    federate: Build, make_participants: Clouds, unit: str
) -> None:
    clouds = make_participants()
    private = ExamplePrivacy(0.5, 0.8) if unit == "example" else None
    given: dict[str, Any] = {"devices": jax.devices()[:1], "clients_at_once": 3}

    def run(most: int, batches: Any, members: list[Participant]) -> Any:
        given["training"] = LocalTraining(optax.sgd(0.5), 2, most, 2, private)
        plan = {"plan": plan_of(clouds, batches)} if private else {}
        return trained(federate(unit, participants=members, **given, **plan))

    mixed, rows = run(6, OWN, with_batches(clouds))
    alone, alone_rows = run(2, 2, clouds)
    largest, _ = run(6, 6, clouds)
    for k, other in ((0, alone), (1, largest)):
        jax.tree.map(
            lambda a, b, k=k: np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-6),
            mixed,
            other,
        )
    assert rows[0] == alone_rows[0]
    if unit == "none":
        assert rows.tolist() == [2 * size for size in OWN]
    apart = jax.tree.map(lambda a, b: float(np.abs(a[0] - b[0]).max()), mixed, largest)
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_rows_are_drawn_at_the_rates_that_are_accounted_for(make_participants: Clouds) -> None:
    clouds = with_batches(make_participants())
    training = LocalTraining(optax.sgd(0.5), 2, 6, 2, ExamplePrivacy(0.5, 0.8))
    plan = plan_of(clouds, OWN)
    truth = [size / cloud.rows for size, cloud in zip(OWN, clouds, strict=True)]
    np.testing.assert_allclose(plan.sampler.rates, truth, rtol=1e-6)
    assert sampler_of(clouds, training) == plan.sampler
    drawn = np.asarray(client_tables(clouds, training).rate)
    assert drawn.astype(np.float64).tolist() == list(plan.sampler.rates)
    np.testing.assert_allclose(plan.expected_sizes, OWN, rtol=1e-6)


def test_epsilon_is_the_largest_of_the_clients_own(make_participants: Clouds) -> None:
    clouds = make_participants()
    plan = plan_of(clouds, OWN)
    alone = [plan_of([cloud], size).epsilon() for cloud, size in zip(clouds, OWN, strict=True)]
    assert plan.epsilon_per_cloud() == tuple(alone)
    assert plan.epsilon() == max(alone) == alone[1]
    # Of 2 in 20 less can be told than of 6 in 32, and neither hides behind the other's rate.
    assert alone[0] < alone[1]
    # Each client more takes as long to account for; two are as good as three.
    budget = plan_of(clouds[:2], OWN[:2]).noise_for(0.5)
    each = budget.epsilon_per_cloud()
    assert each is not None
    assert max(each) <= 0.5


@pytest.mark.parametrize("batches", [2, 6, (2, 4, 4), (2, 6, 6), (6, 2, 4)])
def test_a_plan_of_other_batches_is_refused(
    federate: Build, make_participants: Clouds, batches: Any
) -> None:
    """Whether it would state too little or too much."""
    clouds = with_batches(make_participants())
    training = LocalTraining(optax.sgd(0.5), 2, 6, 2, ExamplePrivacy(0.5, 0.8))
    plan = plan_of(clouds, batches)
    with pytest.raises(Refused, match="its epsilon would be wrong"):
        federate("example", participants=clouds, training=training, plan=plan)


def test_batches_that_no_cloud_can_draw(make_participants: Clouds) -> None:
    clouds = make_participants()
    with pytest.raises(UserError, match=r"at most 32, the examples of number 2 of \[.*\], got 33"):
        plan_of(clouds, (2, 33, 4))
    with pytest.raises(
        UserError, match=r"at most 16, .* of number 2 of \[.*\] divided by the period 2"
    ):
        plan_of(clouds, (2, 17, 4), period=2)
    with pytest.raises(
        UserError, match="3 expected batches are needed, one for each number of examples, got"
    ):
        plan_of(clouds, (2, 6))


@pytest.mark.parametrize("size", [0, 7])
def test_a_batch_beyond_the_run_s_is_refused(
    federate: Build, make_participants: Clouds, size: int
) -> None:
    clouds = with_batches(make_participants(), (2, size, 4))
    words = f"batch size of 'south' must be between 1 and 6, the run's, got {size}"
    with pytest.raises(UserError, match=words):
        federate(participants=clouds)


def test_virtual_time_counts_a_client_s_own_rows(
    federate: Build, make_participants: Clouds
) -> None:
    clouds = make_participants()
    whole = spent_in(federate(participants=clouds).calendar, 1)
    mixed = spent_in(federate(participants=with_batches(clouds)).calendar, 1)
    for one, other, size in zip(mixed, whole, OWN, strict=True):
        assert one.train == pytest.approx(other.train * size / 6, rel=1e-9)
