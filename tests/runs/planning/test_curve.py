"""The learning curve finds what power laws do, and says how sure it is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.runs.planning.curve import fit


def law(floor: float, scale: float, offset: float, exponent: float, rounds: int) -> np.ndarray:
    return floor + scale * (np.arange(rounds + 1) + offset) ** -exponent


@settings(deadline=None, max_examples=30)
@given(
    floor=st.floats(0.5, 3.0),
    scale=st.floats(0.5, 5.0),
    offset=st.floats(0.7, 10.0),
    exponent=st.floats(0.2, 1.0),
)
def test_a_power_law_is_carried_on_to_twice_its_rounds(
    floor: float, scale: float, offset: float, exponent: float
) -> None:
    losses = law(floor, scale, offset, exponent, 24)
    found = fit(losses[:13].tolist()).reach(float(losses[24]), 240)
    assert found.low <= found.rounds <= found.high
    assert found.rounds == pytest.approx(24, rel=0.25)


def test_noise_widens_the_interval_which_holds_the_truth_as_often_as_it_says() -> None:
    draw, held, widths = np.random.default_rng(1), [], {0.002: [], 0.02: []}
    for noise, found in widths.items():
        for _ in range(40):
            floor, scale, exponent = draw.uniform(1, 2), draw.uniform(1, 4), draw.uniform(0.3, 1)
            losses = law(floor, scale, 1.0, exponent, 60)
            seen = losses + draw.normal(0, noise, 61)
            target = float(losses[24])
            true = int(np.argmax(seen <= target))
            if seen[:13].min() <= target:
                continue
            reach = fit(seen[:13].tolist()).reach(target, 120)
            held.append(reach.low - 1 <= true <= reach.high + 1)
            found.append(min(reach.high, 120) - reach.low)
    assert np.mean(held) >= 0.7
    assert np.mean(widths[0.02]) > np.mean(widths[0.002])


def test_a_target_that_was_reached_is_known_without_doubt() -> None:
    found = fit([5.0, 4.0, 3.0, 2.5, 2.6]).reach(3.0, 40)
    assert (found.low, found.rounds, found.high) == (2, 2, 2)


def test_lower_targets_come_later() -> None:
    curve = fit(law(1.0, 3.0, 1.0, 0.7, 10).tolist())
    rounds = [curve.reach(target, 100).rounds for target in (1.5, 1.4, 1.3)]
    assert rounds == sorted(rounds) and rounds[0] < rounds[-1]


@pytest.mark.parametrize(
    "losses", [[3.0] * 8, [3.0, 3.1, 3.2, 3.3, 3.4], law(2.0, 2.0, 1.0, 1.5, 12).tolist()]
)
def test_a_target_below_where_the_loss_levels_off_is_never_reached(losses: list[float]) -> None:
    assert math.isinf(fit(losses).reach(0.5, 120).rounds)


@pytest.mark.parametrize(
    ("losses", "words"),
    [([3.0, 2.0, 1.0], "pilot_rounds"), ([3.0, 2.0, math.nan, 1.0], "learning_rate")],
)
def test_what_cannot_be_fitted_is_one_line(losses: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        fit(losses)
    assert "\n" not in str(error.value)
