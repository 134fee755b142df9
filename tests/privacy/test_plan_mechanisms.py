"""Plans beyond DP-SGD: their epsilons against independent accounting, and what they refuse."""

import dataclasses
import math
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.privacy import (
    AdaptiveClip,
    Banded,
    Buffered,
    DiscreteGaussianShares,
    Independent,
    IntegerMechanism,
    LambdaCgd,
    PrivacyPlan,
    SkellamShares,
)

EXAMPLES: dict[str, Any] = {
    "expected_batch": 8.0,
    "steps_per_round": 4,
    "rounds": 20,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": 1e-5,
}
CLIENTS: dict[str, Any] = {
    "rounds": 20,
    "clip_norm": 0.5,
    "noise_multiplier": 2.0,
    "delta": 1e-3,
}


def for_examples(examples: tuple[int, ...] = (400, 800), **changes: Any) -> PrivacyPlan:
    return PrivacyPlan.for_examples(examples, **(EXAMPLES | changes))


def for_clients(clients: int = 10, **changes: Any) -> PrivacyPlan:
    return PrivacyPlan.for_clients(clients, **(CLIENTS | changes))


def accountant(relation: Any = dp.NeighboringRelation.ADD_OR_REMOVE_ONE) -> Any:
    return pld.PLDAccountant(relation)


INTEGER = IntegerMechanism(SkellamShares(10, 2), sensitivity=4000.0, dimension=5000)
# Ten plans: every unit, sampler, mechanism and relation that has a `dp_accounting` event.
PLANS = [
    for_examples(),
    for_examples(noise_multiplier=0.6, rounds=5),
    for_examples((8, 8)),
    for_examples(unit="user"),
    for_examples(period=5),
    for_examples(period=5, correlation=Banded(80, 5)),
    for_examples(period=50, correlation=LambdaCgd(80, 0.5), expected_batch=8.0, examples=(400,)),
    for_clients(rate=0.25),
    for_clients(period=4, correlation=Buffered(20, 2, 4)),
    for_examples(adjacency="replace"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_ten_plans_have_the_accountants_epsilon(plan: PrivacyPlan) -> None:
    relation = (
        dp.NeighboringRelation.REPLACE_ONE
        if plan.adjacency == "replace"
        else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    for rounds in (1, plan.rounds):
        expected = accountant(relation).compose(plan.event(rounds)).get_epsilon(plan.delta)
        assert plan.epsilon(rounds) == pytest.approx(expected, abs=1e-6)


def test_turns_count_once_a_period() -> None:
    """80 steps in turns of five are 16 mechanisms at five times the rate."""
    plan = for_examples(period=5)
    rate = plan.sampler.rates[0]
    assert rate == pytest.approx(5 * 8 / 400)
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(1.0)), 16)
    assert plan.epsilon() == pytest.approx(accountant().compose(event).get_epsilon(1e-5), abs=1e-6)
    # The last period may be cut short; its turn counts whole.
    assert plan.event(1) == dp.SelfComposedDpEvent(event.event, 1)
    assert plan.expected_sizes == pytest.approx((8.0, 8.0))


def test_bands_within_the_period_cost_what_independent_noise_costs() -> None:
    assert for_examples(period=5, correlation=Banded(80, 5)).epsilon() == pytest.approx(
        for_examples(period=5).epsilon() or 0
    )
    assert for_examples(correlation=Independent(80)).epsilon() == for_examples().epsilon()
    assert for_examples(correlation=LambdaCgd(80, 0.0)).epsilon() == for_examples().epsilon()


@pytest.mark.parametrize("kind", [LambdaCgd(20, 0.5), Banded(20, 6), Buffered(20, 2, 4)])
def test_noise_that_reaches_the_next_turn_is_one_gaussian(kind: Any) -> None:
    """And sampling is not counted: it only takes participations away."""
    plan = for_clients(period=4, correlation=kind)
    expected = get_epsilon_gaussian(2.0 / kind.sensitivity(4), 1e-3)
    assert plan.epsilon() == pytest.approx(expected)
    sampled = for_clients(period=4, correlation=kind, rate=0.1)
    assert sampled.epsilon() == plan.epsilon()
    some = plan.epsilon(3)
    assert some is not None and some < expected
    assert plan.epsilon(3) == pytest.approx(
        get_epsilon_gaussian(2.0 / kind.sensitivity(4, 3), 1e-3)
    )


def test_replacement_is_farther_than_removal() -> None:
    near, far = for_examples(), for_examples(adjacency="replace")
    assert far.sensitivity == 2 * near.sensitivity
    assert (far.epsilon() or 0) > (near.epsilon() or 0)
    full = for_clients(adjacency="replace")
    assert full.epsilon() == pytest.approx(for_clients(noise_multiplier=1.0).epsilon() or 0)


def test_integer_noise_is_accounted_for_by_its_shares() -> None:
    plan = for_clients(trust="distributed", integer=INTEGER)
    assert plan.epsilon() == INTEGER.shares.epsilon(8000.0, 4000.0, 5000, 20, 1e-3)
    gaussian = for_clients().epsilon()
    assert gaussian is not None and gaussian < (plan.epsilon() or 0) < 1.2 * gaussian
    assert for_clients(trust="distributed", integer=INTEGER, rate=0.1).epsilon() == plan.epsilon()
    assert isinstance(plan.event(), dp.UnsupportedDpEvent)
    with pytest.raises(dp.UnsupportedEventError):
        accountant().compose(plan.event())


def test_discrete_gaussian_shares_that_are_too_small_give_no_epsilon() -> None:
    coarse = IntegerMechanism(DiscreteGaussianShares(10), sensitivity=0.3, dimension=10)
    report = for_clients(trust="distributed", integer=coarse).report()
    assert report.epsilon is None and "finer fixed point" in (report.reason or "")


@pytest.mark.parametrize(
    "plan",
    [
        for_examples(),
        for_examples(period=5, correlation=Banded(80, 5)),
        for_clients(period=4, correlation=LambdaCgd(20, 0.5)),
        for_clients(trust="distributed", integer=INTEGER),
        for_examples(adjacency="replace"),
    ],
)
def test_noise_for_a_target_and_rounds_for_a_budget(plan: PrivacyPlan) -> None:
    found = plan.noise_for(2.0)
    epsilon = found.epsilon()
    assert epsilon is not None and epsilon <= 2.0
    less = dataclasses.replace(found, noise_multiplier=found.noise_multiplier * 0.995)
    assert (less.epsilon() or 0) > 2.0
    rounds = plan.rounds_within(epsilon)
    assert (plan.epsilon(rounds) or 0) <= epsilon
    assert rounds == plan.rounds or (plan.epsilon(rounds + 1) or 0) > epsilon


def test_a_budget_allows_so_many_rounds() -> None:
    plan = for_clients()
    seven = plan.epsilon(7)
    assert seven is not None
    assert dataclasses.replace(plan, budget=seven).allowed_rounds == 7
    assert dataclasses.replace(plan, budget=seven * 0.999).allowed_rounds == 6
    assert dataclasses.replace(plan, budget=1e6).allowed_rounds == 20
    assert plan.allowed_rounds == 20
    with pytest.raises(Refused, match="does not allow one round, which costs epsilon"):
        dataclasses.replace(plan, budget=0.01)
    with pytest.raises(UserError, match="the budget must be above 0"):
        dataclasses.replace(plan, budget=0.0)
    with pytest.raises(UserError, match="would never be spent"):
        PrivacyPlan("none", PrivacyPlan.without_privacy(3).sampler, 3, budget=1.0)


def test_a_cloud_spends_what_it_took_part_in() -> None:
    plan = for_examples()
    assert plan.epsilon_per_cloud(5, [20, 0]) == (plan.epsilon(5), 0.0)
    half = plan.epsilon_per_cloud(5, [10, 20])
    assert half is not None and half[0] == for_examples(steps_per_round=2).epsilon(5)
    clients = for_clients(3)
    spent = clients.epsilon_per_cloud(5, [5, 2, 0])
    assert spent == (clients.epsilon(5), clients.epsilon(2), 0.0)
    # Turns count on the steps of the run: all steps that a cloud took may be turns of one unit.
    turns = for_examples((48,), expected_batch=8.0, steps_per_round=2, period=2, rounds=4)
    assert turns.epsilon_per_cloud(4, [4]) == (turns.epsilon(4),)
    two = turns.epsilon_per_cloud(4, [2])
    assert two is not None and two[0] == turns.epsilon(2)
    # Where noise hangs together, a smaller number of turns is not certified to cost less.
    tied = for_clients(3, correlation=LambdaCgd(20, 0.5))
    assert tied.epsilon_per_cloud(5, [5, 2, 0]) == (tied.epsilon(5), tied.epsilon(5), 0.0)
    with pytest.raises(UserError, match="3 numbers of steps are needed"):
        clients.epsilon_per_cloud(5, [1])


def test_the_table_goes_over_noise_rate_and_rounds() -> None:
    plan = for_examples()
    rows = plan.epsilon_table((1.0, 2.0), (5, 20), (0.5, 1.0, 100.0))
    assert [(row.noise_multiplier, row.rounds) for row in rows[:4]] == [
        (1.0, 5),
        (1.0, 20),
        (2.0, 5),
        (2.0, 20),
    ]
    assert len(rows) == 8  # a rate above one is left out
    assert rows[5].report.epsilon == plan.epsilon(20)
    halved = for_examples((800, 1600)).epsilon(20)
    assert rows[1].report.epsilon == pytest.approx(halved or 0)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: for_examples(clip_norm_from="data"), Refused, "looking at the private data"),
        (lambda: for_clients(error_feedback=True), Refused, "error feedback adds to a message"),
        (lambda: for_examples(unit="user", packed=True), Refused, "a packed row"),
        (lambda: for_examples(unit="user", weights="examples"), Refused, "how many a user has"),
        (lambda: for_examples(trust="central"), UserError, "trust is local"),
        (lambda: for_clients(trust="distributed"), UserError, "goes with integer noise"),
        (lambda: for_clients(integer=INTEGER), UserError, "goes without integer noise"),
        (lambda: for_clients(trust="nobody"), UserError, "trust must be one of"),
        (lambda: for_examples(adjacency="near"), UserError, "adjacency must be one of"),
        (lambda: for_clients(correlation=LambdaCgd(19, 0.5)), UserError, "made for 19 steps"),
        (
            lambda: for_clients(
                trust="distributed", integer=INTEGER, correlation=LambdaCgd(20, 0.5)
            ),
            UserError,
            "leave the correlation out",
        ),
        (lambda: for_examples(adjacency="replace", period=2), Refused, "neighbours by replacement"),
        (
            lambda: for_clients(adjacency="replace", correlation=LambdaCgd(20, 0.5)),
            Refused,
            "neighbours by replacement",
        ),
        (lambda: for_examples(period=60), UserError, "divided by the period 60"),
        (lambda: for_examples(integer=INTEGER), UserError, "which is unit client"),
        (
            lambda: for_clients(correlation=LambdaCgd(20, 0.5)).epsilon(21),
            UserError,
            "made for the 20 rounds",
        ),
        (lambda: for_examples(period=0), UserError, "period of sampling must be at least 1"),
    ],
)
def test_what_cannot_be_certified_is_refused(make: Any, kind: type, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_adaptive_norm_has_a_table_and_a_target_too() -> None:
    """The noise on the count is scaled with that on the sum."""
    plan = for_clients(adaptive=AdaptiveClip(0.5, 0.5, 0.2, count_stddev=2.0))
    found = plan.noise_for(1.0)
    assert found.adaptive is not None and found.adaptive.count_stddev == found.noise_multiplier
    assert len(plan.epsilon_table((1.0, 4.0), (1, 20))) == 4


def test_reasons_name_the_multiplier_that_counts() -> None:
    plan = for_clients(
        rounds=400, noise_multiplier=0.6, delta=1e-3, correlation=LambdaCgd(400, 0.9)
    )
    report = plan.report()
    assert report.epsilon is None and "over what a unit can move" in (report.reason or "")


def test_error_feedback_after_noise_is_post_processing() -> None:
    assert for_examples(error_feedback=True).epsilon() == for_examples().epsilon()


def test_statements_say_who_adds_which_noise() -> None:
    said = for_clients(trust="distributed", integer=INTEGER).statement()
    for words in ("adds a share", "fewer than 8 shares", "that it takes part is public", "Skellam"):
        assert words in said
    assert "count one as colluding" in said  # every client knows its own share
    pooled = IntegerMechanism(SkellamShares(10, 2, 3), sensitivity=4000.0, dimension=5000)
    said = for_clients(trust="distributed", integer=pooled).statement()
    assert "5 of which are the noise" in said and "Up to 3 clients may pool" in said
    local = IntegerMechanism(SkellamShares(10, 9), sensitivity=4000.0, dimension=5000)
    said = for_clients(trust="local", integer=local).statement()
    assert "trusts itself alone" in said and "Released: the messages" in said
    assert "the messages themselves" not in said
    said = for_clients(period=4, correlation=LambdaCgd(20, 0.5)).statement()
    assert "hangs together" in said and "arXiv 2601.22334" in said and "one group in 4" in said
    assert "one user of one cloud" in for_examples(unit="user").statement()
    assert "replaced by another" in for_examples(adjacency="replace").statement()
    assert math.isfinite(for_examples().epsilon() or math.inf)
