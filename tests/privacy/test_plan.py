"""Epsilon against dp_accounting and a float64 integral, monotonicity, and every refusal."""

import dataclasses
import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import pld
from scipy import integrate, stats

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.privacy import PrivacyPlan, SamplerSpec, accounting

EXAMPLES = {
    "expected_batch": 8.0,
    "steps_per_round": 4,
    "rounds": 20,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": 1e-5,
}
CLIENTS = {"rounds": 20, "clip_norm": 0.5, "noise_multiplier": 2.0, "delta": 1e-3}


def for_examples(examples=(400, 800), **changes):
    return PrivacyPlan.for_examples(examples, **(EXAMPLES | changes))


def for_clients(clients=10, **changes):
    return PrivacyPlan.for_clients(clients, **(CLIENTS | changes))


def direct(rate, noise, steps, delta):
    accountant = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp.GaussianDpEvent(noise)
    if rate < 1:
        event = dp.PoissonSampledDpEvent(rate, event)
    return accountant.compose(dp.SelfComposedDpEvent(event, steps)).get_epsilon(delta)


@pytest.mark.parametrize("noise", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("rounds", [1, 20])
def test_epsilon_of_examples_is_the_accountants(noise, rounds):
    plan = for_examples(noise_multiplier=noise)
    rate = float(np.float32(8 / 400))
    assert plan.epsilon(rounds) == pytest.approx(direct(rate, noise, 4 * rounds, 1e-5), rel=1e-6)
    # The slower, more dilute cloud is the safer one; epsilon is the largest.
    first, second = plan.epsilon_per_cloud(rounds)
    assert plan.epsilon(rounds) == first > second
    assert second == pytest.approx(direct(8 / 800, noise, 4 * rounds, 1e-5), rel=1e-6)


@pytest.mark.parametrize(("rate", "rounds"), [(1.0, 1), (1.0, 20), (0.25, 20)])
def test_epsilon_of_clients_is_the_accountants(rate, rounds):
    plan = for_clients(rate=rate)
    expected = direct(rate, 2.0, rounds, 1e-3)
    assert plan.epsilon(rounds) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("plan", [for_examples(), for_clients(), for_clients(rate=0.5)])
def test_event_composes_to_the_same_epsilon(plan):
    accountant = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    expected = accountant.compose(plan.event(7)).get_epsilon(plan.delta)
    assert plan.epsilon(7) == pytest.approx(expected, abs=1e-6)
    assert plan.event() == plan.event(plan.rounds)


def test_one_step_is_an_upper_bound_of_the_integral():
    """Both hockey-stick divergences of one sampled step, integrated in float64."""
    plan = for_clients(rate=0.25, rounds=1)
    eps, q, z = plan.epsilon(), 0.25, 2.0

    def density(x):
        return stats.norm.pdf(x, 0, z)

    def mixture(x):
        return (1 - q) * density(x) + q * stats.norm.pdf(x, 1, z)

    def stick(p, r, eps):
        f = lambda x: max(p(x) - math.exp(eps) * r(x), 0.0)  # noqa: E731
        return integrate.quad(f, -30, 30, limit=2000, points=np.linspace(-25, 25, 101))[0]

    def delta(eps):
        return max(stick(mixture, density, eps), stick(density, mixture, eps))

    assert delta(eps) <= 1e-3 * (1 + 1e-6)
    assert delta(eps - 1e-3) > 1e-3  # and tight


def test_monotone():
    by_rounds = [for_examples().epsilon(r) for r in (0, 1, 5, 20, 40)]
    assert by_rounds[0] == 0 and by_rounds == sorted(by_rounds) and len(set(by_rounds)) == 5
    by_noise = [for_examples(noise_multiplier=z).epsilon() for z in (0.3, 0.7, 1.0, 4.0)]
    assert by_noise == sorted(by_noise, reverse=True) and len(set(by_noise)) == 4
    by_batch = [for_examples(expected_batch=b).epsilon() for b in (1.0, 8.0, 100.0, 399.0)]
    assert by_batch == sorted(by_batch) and len(set(by_batch)) == 4
    full = for_examples((400,), expected_batch=400.0)
    assert full.sampler.kind == "full" and full.epsilon() > by_batch[-1]
    by_rate = [for_clients(rate=q).epsilon() for q in (0.1, 0.5, 0.9, 1.0)]
    assert by_rate == sorted(by_rate) and len(set(by_rate)) == 4


@pytest.mark.parametrize("plan", [for_examples(), for_clients(), for_clients(rate=0.3)])
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_for_meets_its_target_closely(plan, target):
    found = plan.noise_for(target)
    assert target * 0.99 < found.epsilon() <= target
    assert dataclasses.replace(found, noise_multiplier=plan.noise_multiplier) == plan


def test_noise_for_user_errors():
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="target epsilon"):
            for_examples().noise_for(target)
    with pytest.raises(UserError, match="no epsilon to aim for"):
        PrivacyPlan.without_privacy(3).noise_for(1.0)
    with pytest.raises(UserError, match="no noise reaches"):
        for_clients(delta=1e-6).noise_for(1e-6)


def test_noise_is_calibrated_to_the_sum():
    plan = for_examples(clip_norm=0.5, noise_multiplier=3.0)
    assert (plan.sensitivity, plan.noise_stddev) == (0.5, 1.5)
    assert plan.expected_sizes == pytest.approx((8.0, 8.0), rel=1e-6)
    assert for_clients(rate=0.3).expected_sizes == pytest.approx((3.0,), rel=1e-6)


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sampler": SamplerSpec("fixed", ())}, Refused, "fixed-size batches"),
        ({"noise_multiplier": 0.0}, Refused, "noise multiplier 0 "),
        ({"noise_multiplier": -1.0}, Refused, "noise multiplier -1"),
        ({"noise_multiplier": math.nan}, Refused, "noise multiplier nan"),
        ({"noise_multiplier": math.inf}, Refused, "noise multiplier inf"),
        ({"delta": 0.0}, Refused, "delta must be above 0"),
        ({"delta": -0.1}, Refused, "delta must be above 0"),
        ({"delta": 0.1}, Refused, "one over the number"),
        ({"delta": math.nan}, Refused, "delta must be above 0"),
        ({"clip_norm": 0.0}, UserError, "clip_norm must be positive"),
        ({"clip_norm": -1.0}, UserError, "clip_norm must be positive"),
        ({"clip_norm": math.inf}, UserError, "clip_norm must be positive"),
        ({"clip_norm": math.nan}, UserError, "clip_norm must be positive"),
        ({"rounds": 0}, UserError, "rounds must be at least 1"),
        ({"units": ()}, UserError, "at least one"),
        ({"unit": "sentence"}, UserError, "privacy unit must be"),
        ({"weights": "luck"}, UserError, "weights must be"),
    ],
)
def test_plans_that_cannot_be_made(unit, changes, error, words):
    plan = for_examples() if unit == "example" else for_clients()
    with pytest.raises(error, match=words) as caught:
        dataclasses.replace(plan, **changes)
    assert "\n" not in str(caught.value)


def test_delta_is_compared_with_the_number_of_units():
    assert for_examples((400, 800), delta=1 / 1201).epsilon(1) > 0
    with pytest.raises(Refused, match="1/1200"):
        for_examples((400, 800), delta=1 / 1200)
    with pytest.raises(Refused, match="1/10 "):
        for_clients(10, delta=0.1)


def test_weights_and_packing():
    assert for_examples(weights="examples").weights == "examples"  # N_c is public there
    with pytest.raises(Refused, match="depend on the data"):
        for_clients(weights="examples")
    with pytest.raises(Refused, match="packed row"):
        for_examples(packed=True)


def test_shapes_of_plans():
    with pytest.raises(UserError, match="cannot exceed 1"):
        for_examples((4, 800))
    with pytest.raises(UserError, match="at least one example"):
        for_examples((0, 800))
    with pytest.raises(UserError, match="at least one example"):
        for_examples(())
    with pytest.raises(UserError, match="one sampling rate for each cloud"):
        dataclasses.replace(for_examples(), units=(400,))
    with pytest.raises(UserError, match="one number of clients"):
        dataclasses.replace(for_clients(), units=(5, 5))
    with pytest.raises(UserError, match="must be 1"):
        dataclasses.replace(for_clients(), sampler=SamplerSpec("full", (1.0,), 2))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan, math.inf, 1e-12])
def test_rates_that_are_none(rate):
    with pytest.raises(UserError, match="sampling rate"):
        for_clients(rate=rate)


def test_sampler_specs():
    for arguments in (("random", (0.1,)), ("fixed", (0.1,)), ("poisson", ()), ("full", (0.5,))):
        with pytest.raises(UserError):
            SamplerSpec(*arguments)
    with pytest.raises(UserError, match="steps per round"):
        SamplerSpec("full", (1.0,), 0)


def test_no_cloud_spends_more_than_is_stated():
    for noise, delta in ((0.3, 1e-9), (5.0, 1e-9), (0.3, 1e-17)):
        plan = PrivacyPlan.for_examples(
            (10, 10, 10), expected_batch=np.array([10, 9.99, 5]), steps_per_round=50, rounds=2,
            clip_norm=1.0, noise_multiplier=noise, delta=delta,
        )  # fmt: skip
        each = plan.epsilon_per_cloud()
        assert each[0] >= each[1] >= each[2]
        assert plan.epsilon() == max(each)


def test_a_sampler_that_disagrees_with_the_plan_is_refused():
    plan = for_examples()
    plan.check_sampler(SamplerSpec("poisson", (8 / 400, 8 / 800), 4))
    plan.check_sampler(SamplerSpec("poisson", tuple(np.float32(plan.sampler.rates).tolist()), 4))
    for actual in (
        SamplerSpec("fixed", (), 4),
        SamplerSpec("poisson", (8 / 400, 8 / 800), 5),
        SamplerSpec("poisson", (9 / 400, 8 / 800), 4),
        SamplerSpec("poisson", (8 / 800, 8 / 400), 4),
        SamplerSpec("full", (1.0, 1.0), 4),
    ):
        with pytest.raises(Refused, match="but the plan accounts for"):
            plan.check_sampler(actual)
    PrivacyPlan.without_privacy(3).check_sampler(SamplerSpec("poisson", (0.5,), 4))


def test_without_privacy():
    plan = PrivacyPlan.without_privacy(3, 2)
    report = plan.report()
    assert report.epsilon is None and report.reason == "no differential privacy was asked for"
    assert plan.epsilon() is None and plan.epsilon_per_cloud() is None
    assert plan.noise_stddev == 0 and plan.expected_sizes == ()
    assert plan.event() == dp.NonPrivateDpEvent() and plan.epsilon_table((1.0,), (1,)) == ()
    assert "No differential privacy" in plan.statement() and "no epsilon" in str(report)
    with pytest.raises(UserError, match="promises nothing"):
        dataclasses.replace(plan, noise_multiplier=1.0)


def test_an_epsilon_that_cannot_be_certified_is_not_printed():
    report = for_examples(noise_multiplier=0.01).report()
    assert report.epsilon is None and "too small to account for" in report.reason
    assert "epsilon" not in str(report).removeprefix("no epsilon")


def test_a_delta_that_sampling_cannot_be_counted_for_is_counted_without():
    plan = for_examples(delta=1e-300)
    assert accounting.epsilon(0.5, plan.noise_multiplier, plan.steps, 1e-300) == math.inf
    assert plan.epsilon() == accounting.epsilon(1.0, plan.noise_multiplier, plan.steps, 1e-300)


def test_reports_and_statements():
    plan = for_examples()
    report = plan.report(5)
    assert report.reason is None and report.epsilon == plan.epsilon(5)
    assert f"epsilon {report.epsilon:.4f} at delta 1e-05 per example after 5 rounds" == str(report)
    text = plan.statement()
    for words in ("one training example of one cloud", "Poisson", "trusts itself", "Released"):
        assert words in text
    text = for_clients(rate=0.5).statement()
    for words in ("one client", "server sees the sum before noise", "took part", "Released"):
        assert words in text
    assert "took part" not in for_clients().statement()
    with pytest.raises(UserError, match="rounds must be zero or more"):
        plan.epsilon(-1)


def test_epsilon_table():
    rows = for_clients().epsilon_table((1.0, 2.0), (1, 10))
    assert [(r.noise_multiplier, r.rounds) for r in rows] == [(1, 1), (1, 10), (2, 1), (2, 10)]
    assert rows[2].report.epsilon == for_clients().epsilon(1)
    with pytest.raises(Refused):
        for_clients().epsilon_table((0.0,), (1,))
