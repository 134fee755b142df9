"""The test against a plan's own trade-off: jax-privacy's for Gaussians, valid for samples."""

import math

import numpy as np
import pytest
from jax_privacy import auditing

from fedjax_llm.audit import audit
from fedjax_llm.audit.trade_off import plan_inverse, profile_inverse, refuted
from fedjax_llm.privacy import PrivacyPlan

DELTA = 1e-5


def plan_of(noise: float, rate: float = 1.0, rounds: int = 1, clients: int = 2000) -> PrivacyPlan:
    return PrivacyPlan.for_clients(
        clients, rounds=rounds, clip_norm=1.0, noise_multiplier=noise, delta=DELTA, rate=rate
    )


@pytest.mark.parametrize(
    ("guesses", "correct", "canaries"), [(60, 55, 1000), (125, 110, 1000), (20, 20, 100)]
)
def test_it_agrees_with_jax_privacy_on_gaussians(guesses: int, correct: int, canaries: int) -> None:
    """Below the epsilon that jax-privacy finds the Gaussian is refuted, above it is not."""
    in_scores = np.concatenate([np.ones(correct), np.zeros(canaries // 2 - correct)])
    out_scores = np.concatenate(
        [np.ones(guesses - correct), np.zeros(canaries - canaries // 2 - guesses + correct)]
    )
    found = auditing.CanaryScoreAuditor(in_scores, out_scores).epsilon_one_run_fdp(
        0.01, DELTA, threshold_strategy=auditing.Explicit(0.5)
    )
    for share, expected in ((0.97, True), (1.01, False)):
        noise = plan_of(1.0).noise_for(share * found).noise_multiplier
        inverse = plan_inverse(plan_of(noise), noise)
        assert refuted(guesses, correct, canaries, 0.01, inverse) == expected


def test_the_inverse_of_a_pure_profile_is_that_of_randomised_response() -> None:
    inverse = profile_inverse(np.array([1.0]), np.array([0.0]))
    for x in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert inverse(x) == pytest.approx(max(x / math.e, 1 - math.e * (1 - x)))


def test_nothing_right_refutes_nothing() -> None:
    inverse = profile_inverse(np.array([0.0]), np.array([0.0]))
    assert not refuted(10, 0, 10, 0.05, inverse)
    assert not refuted(10, 5, 10, 0.05, inverse)
    assert refuted(10, 10, 10, 0.05, inverse)


def sampled_run(draw: np.random.Generator, count: int, plan: PrivacyPlan) -> tuple:
    """Scores of canaries under Poisson-sampled Gaussian mechanisms, and their coins."""
    rate, noise = plan.sampler.rates[0], plan.noise_multiplier
    coins = draw.random(count) < 0.5
    scores = np.zeros(count)
    for _ in range(plan.rounds):
        x = (draw.random(count) < rate) * coins + noise * draw.normal(size=count)
        scores += np.logaddexp(math.log1p(-rate), math.log(rate) + (x - 0.5) / noise**2)
    return scores, coins


def test_sampled_runs_are_consistent_and_the_test_has_more_power_than_eps_delta() -> None:
    draw, plan = np.random.default_rng(4), plan_of(0.6, 0.1, 20)
    own, other = [], []
    for _ in range(3):
        scores, coins = sampled_run(draw, 1000, plan)
        report = audit(scores, coins, plan)
        assert report.consistent and report.method == "f-dp"
        own.append(report.lower_bound)
        other.append(audit(scores, coins, plan, method="eps-delta").lower_bound)
    assert np.mean(own) > 1.4 * np.mean(other)
    assert np.mean(own) > 0.2 * report.upper_bound


@pytest.mark.drill
@pytest.mark.parametrize(("noise", "rate", "rounds"), [(0.6, 0.1, 20), (1.5, 0.1, 200)])
def test_calibration_over_many_sampled_runs(noise: float, rate: float, rounds: int) -> None:
    """Of 300 runs that are what their plan says, at most 5 % are called inconsistent."""
    draw, plan = np.random.default_rng(6), plan_of(noise, rate, rounds, 400)
    inverse = plan_inverse(plan, noise)
    over = 0
    for _ in range(300):
        scores, coins = sampled_run(draw, 300, plan)
        order = np.argsort(-np.abs(scores))[:40]
        correct = int(np.sum((scores > 0)[order] == coins[order]))
        over += refuted(40, correct, 300, 0.05, inverse)
    assert over <= 15
