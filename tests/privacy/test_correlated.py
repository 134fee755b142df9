"""Correlated noise against dense matrices in float64."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import Banded, Buffered, Correlation, Independent, LambdaCgd

STEPS = 13
KINDS = [
    Independent(STEPS),
    LambdaCgd(STEPS, 0.7),
    LambdaCgd(STEPS, 0.0),
    Banded(STEPS, 1),
    Banded(STEPS, 4),
    Buffered(STEPS, 2, 4),
]
each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.bands}")


def strategy(kind: Correlation) -> np.ndarray:
    """C, dense."""
    coefficients = kind.coefficients()
    dense = np.array(
        [[coefficients[i - j] if i >= j else 0.0 for j in range(STEPS)] for i in range(STEPS)]
    )
    return dense / np.linalg.norm(dense, axis=0)


def noise(kind: Correlation, draws: Any) -> list[Any]:
    """The noise of all steps, from draws given by their number."""
    state, found = kind.init(draws(jnp.int32(0))), []
    for step in range(kind.steps):
        drawn, state = kind.next(jnp.int32(step), draws, state)
        found.append(drawn)
    return found


@each
def test_coefficients_fall_and_columns_have_length_one(kind: Correlation) -> None:
    coefficients = kind.coefficients()
    assert coefficients.shape == (STEPS,) and coefficients.dtype == np.float64
    assert coefficients[0] > 0 and np.all(np.diff(coefficients) <= 0)
    assert np.all(coefficients >= 0) and np.all(coefficients[kind.bands :] == 0)
    np.testing.assert_allclose(
        kind.column_norms, [np.linalg.norm(coefficients[: STEPS - t]) for t in range(STEPS)]
    )


@each
def test_the_noise_is_the_inverse_times_independent_draws(kind: Correlation) -> None:
    """For a tree of two shapes; each draw is the unit vector of its step."""

    def draws(index: jax.Array) -> dict[str, jax.Array]:
        unit = (jnp.arange(STEPS) == index).astype(jnp.float32)
        return {"a": unit, "b": jnp.tile(unit, (2, 1))}

    found = noise(kind, draws)
    inverse = np.linalg.inv(strategy(kind))
    np.testing.assert_allclose(np.stack([x["a"] for x in found]), inverse, atol=2e-5)
    np.testing.assert_allclose(np.stack([x["b"][1] for x in found]), inverse, atol=2e-5)


@each
def test_all_steps_in_one_program_are_the_same_noise(kind: Correlation) -> None:
    def draws(index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(3), index), (5,), jnp.float32)

    def step(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        drawn, state = kind.next(index, draws, state)
        return state, drawn

    _, together = jax.lax.scan(step, kind.init(jnp.zeros(5)), jnp.arange(STEPS))
    np.testing.assert_allclose(together, np.stack(noise(kind, draws)), atol=2e-5)


@each
@pytest.mark.parametrize("period", [1, 2, 4, 5, STEPS, STEPS + 3])
@pytest.mark.parametrize("steps", [1, 6, STEPS])
def test_no_participation_moves_more_than_the_sensitivity(
    kind: Correlation, period: int, steps: int
) -> None:
    """All subsets of the turns of every unit, at any angles; the bound is reached where it should.

    A prefix counts what has been released so far.
    """
    dense = strategy(kind)[:steps, :steps]
    stated = kind.sensitivity(period, steps)
    draw = np.random.default_rng(0)
    largest = 0.0
    for first in range(min(period, steps)):
        turns = range(first, steps, period)
        chosen = list(turns)
        largest = max(largest, float(np.linalg.norm(dense[:, chosen].sum(axis=1))))
        for _ in range(20):
            some = [turn for turn in turns if draw.random() < 0.7]
            moves = draw.normal(size=(len(some), 6))
            moves /= np.linalg.norm(moves, axis=1, keepdims=True)
            moved = float(np.linalg.norm(dense[:, some] @ moves))
            assert moved <= stated * (1 + 1e-9)
    assert largest <= stated * (1 + 1e-9)
    if kind.bands > period:
        assert stated <= largest * (1 + 1e-9)


def test_bands_within_the_period_do_not_overlap() -> None:
    kind = Banded(STEPS, 4)
    dense = strategy(kind)
    for first, other in itertools.combinations(range(0, STEPS, 4), 2):
        assert dense[:, first] @ dense[:, other] == 0
    assert kind.sensitivity(4) == math.sqrt(4)  # ceil(13 / 4) turns, each of length one


@pytest.mark.parametrize("period", [1, 4])
def test_the_sensitivity_agrees_with_jax_privacy(period: int) -> None:
    from jax_privacy.matrix_factorization import sensitivity

    for kind in KINDS:
        dense = strategy(kind).astype(np.float32)
        gram = jnp.asarray(dense.T @ dense)
        bound = sensitivity.get_min_sep_sensitivity_upper_bound_for_X(gram, min_sep=period)
        assert kind.sensitivity(period) <= bound * (1 + 1e-5)
        if kind.bands <= period:
            exact = sensitivity.get_sensitivity_banded(jnp.asarray(dense), min_sep=period)
            assert kind.sensitivity(period) == pytest.approx(exact, rel=1e-5)


def test_running_sums_feel_less_of_it() -> None:
    """Per unit of sensitivity, for units that take part every eight steps of 64."""

    def error(kind: Correlation) -> float:
        dense = kind.root_mean_square() * kind.sensitivity(8)
        return dense / (math.sqrt(65 / 2) * math.sqrt(8))

    assert error(Independent(64)) == pytest.approx(1)
    assert error(LambdaCgd(64, 0.5)) < 0.65
    assert error(Banded(64, 8)) < 0.5
    assert error(Buffered(64, 3, 8)) < 0.52


def test_the_stated_error_is_that_of_the_noise() -> None:
    for kind in KINDS:
        rows = np.tril(np.ones((STEPS, STEPS))) @ np.linalg.inv(strategy(kind))
        measured = math.sqrt(np.square(rows).sum() / STEPS)
        assert kind.root_mean_square() == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LambdaCgd(5, 1.0), r"must be in \[0, 1\), got 1"),
        (lambda: LambdaCgd(5, -0.1), "got -0.1"),
        (lambda: Banded(5, 6), "bands must be between 1 and 5"),
        (lambda: Banded(5, 0), "got 0"),
        (lambda: Buffered(5, 11), "buffers must be between 1 and 10"),
        (lambda: Buffered(5, 2, 0), "the period must be at least 1"),
        (lambda: Buffered(STEPS, 2, 1), "finds no buffered noise better than independent"),
        (lambda: Buffered(60, 10, 1), "use fewer buffers|no buffered noise better"),
    ],
)
def test_bad_input_is_told_in_one_line(make: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()
