"""The bounds against hand-computed cases, and their confidence over many simulated runs."""

import dataclasses
import math

import numpy as np
import pytest

from fedjax_llm.audit import audit, lower_bound
from fedjax_llm.audit.guesses import GUESSED
from fedjax_llm.audit.one_run import Method
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.privacy import PrivacyPlan

DELTA = 1e-5
SETS = len(GUESSED) + 1


def gaussian_epsilon(mu: float) -> float:
    plan = PrivacyPlan.for_clients(2, rounds=1, clip_norm=1.0, noise_multiplier=1 / mu, delta=DELTA)
    epsilon = plan.epsilon()
    assert epsilon is not None
    return epsilon


def gaussian_run(draw: np.random.Generator, count: int, mu: float) -> tuple:
    """Log-likelihood ratios of canaries that do not disturb each other, and their coins."""
    coins = draw.random(count) < 0.5
    return mu * (draw.normal(size=count) + mu * coins - mu / 2), coins


def tail(guesses: int, correct: int, probability: float) -> float:
    return sum(
        math.comb(guesses, i) * probability**i * (1 - probability) ** (guesses - i)
        for i in range(correct, guesses + 1)
    )


def solved(guesses: int, correct: int, significance: float) -> float:
    """The epsilon at which so many right guesses are just unlikely enough, by bisection."""
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        if tail(guesses, correct, 1 / (1 + math.exp(-middle))) < significance:
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("count", [16, 100, 400])
def test_all_guesses_right_give_the_known_bound(count: int) -> None:
    """Of a pure epsilon: the probability of being right is at most q, and q^M = significance."""
    coins = np.random.default_rng(0).random(count) < 0.5
    found = lower_bound(np.where(coins, 50.0, -1.0), coins, delta=1e-13)
    probability = (0.05 / SETS) ** (1 / count)
    assert found.epsilon == pytest.approx(math.log(probability / (1 - probability)), rel=1e-5)
    assert found.guesses == found.correct == count


def test_some_guesses_wrong_give_the_binomial_bound() -> None:
    """64 canaries, of which only the sixteen of the largest scores show anything; one deceives."""
    coins = np.arange(64) % 2 == 0
    scores = np.where(coins, 1.0, -1.0) * np.where(np.arange(64) < 16, 10.0, 0.0)
    scores[0] = -11.0
    found = lower_bound(scores, coins, delta=1e-13, neutral=0.0)
    assert (found.guesses, found.correct) == (16, 15)
    assert found.epsilon == pytest.approx(solved(16, 15, 0.05 / SETS), rel=1e-4)


def test_delta_lowers_the_bound() -> None:
    coins = np.random.default_rng(0).random(300) < 0.5
    scores = np.where(coins, 1.0, -1.0)
    bounds = [lower_bound(scores, coins, delta=delta).epsilon for delta in (1e-12, 1e-5, 1e-4)]
    assert bounds[0] > bounds[1] > bounds[2] > 0
    assert lower_bound(scores, coins, delta=0.01).epsilon == 0  # it explains all that was seen


@pytest.mark.parametrize("method", ["eps-delta", "f-dp"])
def test_scores_that_know_nothing_bound_nothing(method: Method) -> None:
    draw = np.random.default_rng(5)
    for _ in range(20):
        coins = draw.random(300) < 0.5
        found = lower_bound(draw.normal(size=300), coins, delta=DELTA, method=method)
        assert found.epsilon < 0.5
    assert lower_bound(np.zeros(300), coins, delta=DELTA, method=method).epsilon == 0


@pytest.mark.parametrize("method", ["eps-delta", "f-dp"])
@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_the_bound_exceeds_a_gaussians_epsilon_in_at_most_five_percent(
    method: Method, mu: float
) -> None:
    draw, true = np.random.default_rng(11), gaussian_epsilon(mu)
    trials = 60
    over = sum(
        lower_bound(*gaussian_run(draw, 60, mu), delta=DELTA, method=method).epsilon > true
        for _ in range(trials)
    )
    assert tail(trials, over, 0.05) > 0.01


def test_the_bound_exceeds_randomised_responses_epsilon_in_at_most_five_percent() -> None:
    """The mechanism for which the bound is tight: every guess is right with probability q."""
    draw, true = np.random.default_rng(3), 1.0
    probability = 1 / (1 + math.exp(-true))
    trials, over, bounds = 400, 0, []
    for _ in range(trials):
        coins = draw.random(200) < 0.5
        answers = coins == (draw.random(200) < probability)
        bounds.append(lower_bound(np.where(answers, 1.0, -1.0), coins, delta=1e-13).epsilon)
    over = sum(bound > true for bound in bounds)
    assert tail(trials, over, 0.05) > 0.01
    assert np.mean(bounds) > 0.4  # and it is not kept by saying nothing


@pytest.mark.drill
@pytest.mark.parametrize("method", ["eps-delta", "f-dp"])
@pytest.mark.parametrize("mu", [0.1, 0.3, 1.0, 2.0])
def test_calibration_over_many_runs(method: Method, mu: float) -> None:
    draw, true = np.random.default_rng(12), gaussian_epsilon(mu)
    trials = 500
    over = sum(
        lower_bound(*gaussian_run(draw, 200, mu), delta=DELTA, method=method).epsilon > true
        for _ in range(trials)
    )
    assert tail(trials, over, 0.05) > 0.01


@pytest.mark.parametrize(("count", "least"), [(500, 0.35), (1000, 0.4)])
def test_the_bound_comes_near_the_truth(count: int, least: float) -> None:
    """Mean over runs, as a share of the true epsilon, at about 4.4 and 7.0."""
    draw = np.random.default_rng(2)
    for mu in (1.0, 1.5):
        bounds = [
            lower_bound(
                *gaussian_run(draw, count, mu), delta=DELTA, method="f-dp", neutral=0.0
            ).epsilon
            for _ in range(4)
        ]
        assert np.mean(bounds) > least * gaussian_epsilon(mu)


def plan(rate: float = 1.0, noise: float = 1.0) -> PrivacyPlan:
    return PrivacyPlan.for_clients(
        120, rounds=1, clip_norm=1.0, noise_multiplier=noise, delta=DELTA, rate=rate
    )


def test_a_report_says_what_was_found_and_whether_it_fits() -> None:
    coins = np.random.default_rng(0).random(100) < 0.5
    caught = audit(np.where(coins, 9.0, -9.0), coins, plan(noise=5.0))
    assert not caught.consistent
    assert str(caught).startswith("audit per client: epsilon at least ")
    assert "REFUTES" in str(caught) and "\n" not in str(caught)
    assert "100 of 100 guesses right" in str(caught)
    assert caught.method == "f-dp"
    calm = audit(np.zeros(100), coins, plan())
    assert calm.consistent and calm.lower_bound == 0 and "consistent with" in str(calm)
    assert calm.upper_bound == plan().epsilon()


def test_plans_of_other_trade_offs_are_not_tested_as_gaussians() -> None:
    coins = np.arange(100) % 2 == 0
    replaced = dataclasses.replace(plan(), adjacency="replace")
    with pytest.raises(Refused, match="use method eps-delta"):
        audit(np.zeros(100), coins, replaced)
    assert audit(np.zeros(100), coins, replaced, method="eps-delta").consistent


@pytest.mark.parametrize(
    ("scores", "coins", "changes", "message"),
    [
        ([], [], {}, "shapes"),
        ([1.0, 2.0], [True], {}, "shapes"),
        ([1.0, math.nan], [True, False], {}, "1 scores are NaN"),
        ([1.0, 2.0], [True, False], {"delta": 0.0}, "delta"),
        ([1.0, 2.0], [True, False], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], [True, False], {"method": "luck"}, "method must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(
    scores: list, coins: list, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        lower_bound(scores, coins, **({"delta": DELTA} | changes))


def test_infinite_scores_are_the_most_extreme() -> None:
    coins = np.arange(64) % 2 == 0
    scores = np.where(coins, math.inf, -math.inf)
    assert lower_bound(scores, coins, delta=1e-13).correct == 64
