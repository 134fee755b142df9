"""Robust combinations against float64 oracles; invariances, absence, breakdown, groups, errors."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from fedjax_llm.aggregation.robust import (
    COMBINES,
    CentredClipping,
    CoordinateMedian,
    GeometricMedian,
    GroupRobust,
    Krum,
    MultiKrum,
    TrimmedMean,
    assign,
)
from fedjax_llm.errors import UserError

CLIENTS, SIZE, BYZANTINE = 9, 5, 2
# Of these the result lies in the box spanned by the messages of those present.
INNER = [
    Krum(BYZANTINE),
    MultiKrum(BYZANTINE),
    MultiKrum(BYZANTINE, selected=3),
    CoordinateMedian(),
    TrimmedMean(BYZANTINE),
    GeometricMedian(),
]
ALL = [*INNER, CentredClipping(radius=2.0)]
every = pytest.mark.parametrize("rule", ALL, ids=str)
every_inner = pytest.mark.parametrize("rule", INNER, ids=str)

_combine = jax.jit(lambda rule, *args: rule.combine(*args), static_argnums=0)


def combine(rule, messages, present=None, memory=None):
    """The combined vector, under jit, with the memory of the first round unless one is given."""
    messages = jnp.asarray(messages, jnp.float32)
    present = np.ones(len(messages), bool) if present is None else present
    memory = rule.init(messages.shape[1]) if memory is None else memory
    out, _ = _combine(rule, messages, jnp.asarray(present), memory)
    assert out.dtype == jnp.float32 and out.shape == messages.shape[1:]
    return np.asarray(out)


def draw(seed, clients=CLIENTS, size=SIZE):
    return np.random.default_rng(seed).normal(size=(clients, size)).astype(np.float32)


def masks(seed, number):
    """A mask with `number` of CLIENTS present."""
    present = np.zeros(CLIENTS, bool)
    present[np.random.default_rng(seed).permutation(CLIENTS)[:number]] = True
    return present


def krum_order(rows, byzantine):
    """Rows from the least to the greatest score, by loops in float64."""
    rows = np.asarray(rows, np.float64)
    score = []
    for i, row in enumerate(rows):
        squares = sorted(sum((row - x) ** 2) for j, x in enumerate(rows) if j != i)
        score.append(sum(squares[: len(rows) - byzantine - 2]))
    return rows[np.argsort(score, kind="stable")]


def oracle(rule, rows, memory=None):
    """The combination of rows that are all present, in float64."""
    rows = np.asarray(rows, np.float64)
    if isinstance(rule, Krum):
        return krum_order(rows, rule.byzantine)[0]
    if isinstance(rule, MultiKrum):
        most = len(rows) - rule.byzantine
        return krum_order(rows, rule.byzantine)[: min(rule.selected or most, most)].mean(0)
    if isinstance(rule, CoordinateMedian):
        return np.median(rows, axis=0)
    if isinstance(rule, TrimmedMean):
        kept = [sorted(c)[rule.byzantine : len(rows) - rule.byzantine] for c in rows.T]
        return np.array([sum(c) / len(c) for c in kept])
    if isinstance(rule, CentredClipping):
        centre = np.zeros(rows.shape[1]) if memory is None else np.asarray(memory, np.float64)
        for _ in range(rule.iterations):
            moves = []
            for row in rows:
                length = np.sqrt(sum((row - centre) ** 2))
                moves.append(
                    (row - centre) * (1 if length <= rule.radius else rule.radius / length)
                )
            centre = centre + sum(moves) / len(rows)
        return centre
    at = rows.mean(0)
    for _ in range(3000):
        weight = 1 / np.maximum(np.sqrt(((rows - at) ** 2).sum(1)), 1e-12)
        at = weight @ rows / weight.sum()
    return at


@pytest.mark.parametrize("number", [7, 8, 9])
@every
def test_equals_the_oracle_of_those_present(rule, number):
    if isinstance(rule, GeometricMedian):
        rule = dataclasses.replace(rule, iterations=300)
    for seed in range(5):
        rows, present = 3 * draw(seed), masks(seed, number)
        expected = oracle(rule, rows[present])
        np.testing.assert_allclose(combine(rule, rows, present), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_eight_weiszfeld_steps_come_close_to_the_geometric_median(far):
    for seed in range(10):
        rows = draw(seed, size=40)
        rows[:BYZANTINE] += np.float32(far)
        exact = oracle(GeometricMedian(), rows)
        start = np.median(rows.astype(np.float64), axis=0)
        error = np.linalg.norm(combine(GeometricMedian(), rows) - exact)
        assert error < 0.02 * np.linalg.norm(start - exact)


def test_krum_tells_apart_messages_that_share_a_large_part():
    # |x|^2 + |y|^2 - 2 <x, y> in float32 is off by about 1 here, and distances are about 0.01.
    for seed in range(10):
        rows = (1000 + 0.03 * draw(seed)).astype(np.float32)
        np.testing.assert_array_equal(
            combine(Krum(BYZANTINE), rows), krum_order(rows, BYZANTINE)[0]
        )


@every
def test_order_of_clients_is_irrelevant(rule):
    for seed in range(5):
        rows, present = draw(seed), masks(seed, 8)
        order = np.random.default_rng(seed + 100).permutation(CLIENTS)
        moved = combine(rule, rows[order], present[order])
        np.testing.assert_allclose(moved, combine(rule, rows, present), rtol=1e-5, atol=1e-6)


@every
def test_translation_moves_the_result_along(rule):
    shift = np.float32([64, -32, 8, 0, 128])
    centre = draw(50, clients=1)[0] if isinstance(rule, CentredClipping) else None
    for seed in range(5):
        rows, present = draw(seed), masks(seed, 8)
        here = combine(rule, rows, present, centre)
        there = combine(rule, rows + shift, present, None if centre is None else centre + shift)
        np.testing.assert_allclose(there - shift, here, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@every
def test_scaling_scales_the_result(rule, scale):
    scaled = rule
    if isinstance(rule, CentredClipping):
        scaled = dataclasses.replace(rule, radius=rule.radius * scale)
    rows = draw(3)
    there = combine(scaled, rows * np.float32(scale))
    np.testing.assert_allclose(there / scale, combine(rule, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -3e38, 0.0])
@every
def test_absent_clients_have_no_influence(rule, junk):
    rows, present = draw(7), masks(7, 7)
    rows[~present] = junk
    alone = combine(rule, rows[present])
    np.testing.assert_allclose(combine(rule, rows, present), alone, rtol=1e-6, atol=1e-6)
    rows[~present] = 1.0
    other = combine(rule, rows, present)
    rows[~present] = junk
    np.testing.assert_array_equal(combine(rule, rows, present), other)


@every
def test_identical_clients_give_their_message(rule):
    row = np.float32([0.1, -0.7, 0.3, 0.0, 1.1])  # shorter than the radius
    out = combine(rule, np.tile(row, (CLIENTS, 1)), masks(1, 7))
    np.testing.assert_allclose(out, row, rtol=3e-7)


@every
def test_nobody_present_gives_zeros_or_the_last_result(rule):
    rows = np.full((CLIENTS, SIZE), np.nan)
    memory = jnp.arange(SIZE, dtype=jnp.float32) if isinstance(rule, CentredClipping) else ()
    expected = np.arange(SIZE) if isinstance(rule, CentredClipping) else np.zeros(SIZE)
    np.testing.assert_array_equal(combine(rule, rows, np.zeros(CLIENTS, bool), memory), expected)


@settings(deadline=None, max_examples=60)
@given(
    rows=arrays(np.float32, (6, 3), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    present=arrays(bool, 6),
)
def test_any_finite_messages_of_any_cohort(rows, present):
    # Fewer may be present than the parameters ask for.
    here = rows[present].astype(np.float64)
    junk = np.where(present[:, None], rows, np.float32(np.nan))
    for rule in INNER:
        out = combine(rule, junk, present)
        low, high = (here.min(0), here.max(0)) if len(here) else (0, 0)
        slack = 1e-6 * np.abs(here).max(initial=0)
        assert (out >= low - slack).all() and (out <= high + slack).all()
    if len(here):
        tolerance = {"rtol": 1e-6, "atol": 1e-6 * np.abs(here).max()}
        median = combine(CoordinateMedian(), junk, present)
        np.testing.assert_allclose(median, np.median(here, axis=0), **tolerance)
        trim = min(BYZANTINE, (len(here) - 1) // 2)
        kept = np.sort(here, axis=0)[trim : len(here) - trim].mean(0)
        np.testing.assert_allclose(
            combine(TrimmedMean(BYZANTINE), junk, present), kept, **tolerance
        )


def spoilt(seed, malicious, far, alike):
    """Messages, their honest part, and its diameter; the malicious ones far away."""
    rows = draw(seed)
    way = np.ones((malicious, SIZE)) if alike else np.sign(draw(seed + 1, clients=malicious))
    rows[:malicious] = far * way
    honest = rows[malicious:].astype(np.float64)
    return rows, honest, max(np.linalg.norm(x - y) for x in honest for y in honest)


@pytest.mark.parametrize("far", [1e6, 3e38])
@pytest.mark.parametrize("alike", [True, False])
@every
def test_a_tolerated_minority_cannot_carry_the_result_off(rule, alike, far):
    for seed in range(5):
        rows, honest, diameter = spoilt(seed, BYZANTINE, far, alike)
        assert np.linalg.norm(combine(rule, rows) - honest.mean(0)) < diameter
        assert np.linalg.norm(rows.astype(np.float64).mean(0) - honest.mean(0)) > 1e3 * diameter


@every_inner
def test_a_majority_carries_the_result_off(rule):
    # The control of the test above: it would notice.
    rows, honest, diameter = spoilt(0, 5, 1e6, alike=True)
    assert np.linalg.norm(combine(rule, rows) - honest.mean(0)) > 1e3 * diameter


def test_multi_krum_takes_all_honest_messages_and_no_other():
    rows, honest, _ = spoilt(0, BYZANTINE, 1e6, alike=True)
    np.testing.assert_allclose(combine(MultiKrum(BYZANTINE), rows), honest.mean(0), rtol=1e-5)


@pytest.mark.parametrize("rule", [Krum(0), MultiKrum(0, selected=1)], ids=str)
def test_krum_takes_somebody_present_even_where_distances_overflow(rule):
    rows = np.float32([[np.nan], [1e30], [-1e30], [3e38]])
    np.testing.assert_array_equal(combine(rule, rows, np.arange(4) > 0), rows[1])


def test_krum_falls_back_on_the_nearest_neighbour_in_a_small_cohort():
    rows = np.float32([[9.0], [1.0], [5.0], [1.5]])
    np.testing.assert_array_equal(combine(Krum(2), rows), [1.0])


def test_krum_breaks_ties_by_order():
    # With three clients each is scored by its nearest: the mutual nearest two always tie.
    rows = np.float32([[9.0], [1.0], [1.5]])
    np.testing.assert_array_equal(combine(Krum(0), rows), [1.0])
    np.testing.assert_array_equal(combine(Krum(0), rows[::-1]), [1.5])


def test_centred_clipping_remembers_and_moves_by_the_radius():
    rule = CentredClipping(radius=0.5, iterations=2)
    memory = rule.init(SIZE)
    goal = np.full(SIZE, 3.0)
    rows = jnp.asarray(np.tile(goal, (CLIENTS, 1)), jnp.float32)
    present = jnp.ones(CLIENTS, bool)
    for turn in range(1, 9):
        out, memory = _combine(rule, rows, present, memory)
        np.testing.assert_array_equal(out, memory)
        length = min(turn * 2 * 0.5, np.linalg.norm(goal))
        np.testing.assert_allclose(out, goal * length / np.linalg.norm(goal), rtol=1e-5)


def test_centred_clipping_bounds_one_client():
    rule = CentredClipping(radius=2.0, iterations=1)
    rows, centre = draw(4), draw(5, clients=1)[0]
    honest = rows.copy()
    honest[0] = centre
    rows[0] = 1e6
    moved = combine(rule, rows, memory=centre) - combine(rule, honest, memory=centre)
    np.testing.assert_allclose(np.linalg.norm(moved), 2.0 / CLIENTS, rtol=1e-5)


@every
def test_cohorts_share_one_program_and_memory_fits_a_scan(rule):
    cohorts = jnp.asarray(np.stack([masks(s, n) for s, n in [(0, 7), (1, 8), (2, 9)]]))
    rows = jnp.asarray(draw(0))

    def turn(memory, present):
        out, memory = rule.combine(rows, present, memory)
        return memory, out

    _, results = jax.jit(lambda: jax.lax.scan(turn, rule.init(SIZE), cohorts))()
    memory = rule.init(SIZE)
    for present, found in zip(cohorts, results, strict=True):
        expected, memory = _combine(rule, rows, present, memory)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (Krum(2), 7),
        (Krum(0), 3),
        (MultiKrum(2), 7),
        (TrimmedMean(2), 5),
        (TrimmedMean(0), 1),
        (CoordinateMedian(), 1),
        (GeometricMedian(), 1),
        (CentredClipping(1.0), 1),
    ],
    ids=str,
)
def test_check_refuses_fewer_clients_than_needed(rule, least):
    rule.check(least)
    with pytest.raises(UserError, match=f"{rule.name} needs at least {least} .*got {least - 1}"):
        rule.check(least - 1)


def test_check_refuses_to_select_more_than_can_be_honest():
    MultiKrum(2, selected=5).check(7)
    with pytest.raises(UserError, match=r"at most 5.*got 6"):
        MultiKrum(2, selected=6).check(7)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Krum(-1),
        lambda: MultiKrum(-1),
        lambda: MultiKrum(1, selected=0),
        lambda: TrimmedMean(-1),
        lambda: GeometricMedian(iterations=0),
        lambda: GeometricMedian(smoothing=0.0),
        lambda: GeometricMedian(smoothing=float("nan")),
        lambda: CentredClipping(0.0),
        lambda: CentredClipping(float("inf")),
        lambda: CentredClipping(float("nan")),
        lambda: CentredClipping(1.0, iterations=0),
        lambda: GroupRobust(0, CoordinateMedian()),
    ],
)
def test_bad_parameters_are_refused_in_one_line(build):
    with pytest.raises(UserError, match=r"^[^\n]*must be[^\n]*got[^\n]*$"):
        build()


def test_registry_builds_what_it_names():
    built = {name: build(2, 0.5) for name, build in COMBINES.items()}
    assert list(built) == [
        "krum",
        "multi-krum",
        "median",
        "trimmed-mean",
        "geometric-median",
        "centred-clipping",
    ]
    for name, rule in built.items():
        assert rule.name == name
        assert getattr(rule, "byzantine", 2) == 2 and getattr(rule, "radius", 0.5) == 0.5
        assert rule.source and "\n" not in rule.summary


@given(groups=st.integers(1, 20), extra=st.integers(0, 60))
def test_assignment_is_balanced(groups, extra):
    group_K = assign(2 * groups + extra, groups)
    sizes = np.bincount(group_K, minlength=groups)
    assert len(sizes) == groups and sizes.sum() == 2 * groups + extra
    assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 2


@pytest.mark.parametrize(("clients", "groups"), [(5, 3), (1, 1), (0, 1), (7, 7)])
def test_a_group_of_one_is_no_secret(clients, groups):
    with pytest.raises(UserError, match=f"{clients} clients.*a group of one is no secret"):
        assign(clients, groups)
    with pytest.raises(UserError, match="a group of one is no secret"):
        GroupRobust(groups, CoordinateMedian()).check(clients)


def test_group_check_asks_the_inner_rule():
    with pytest.raises(UserError, match=r"groups = 6 is too few.*krum needs at least 7"):
        GroupRobust(6, Krum(2)).check(100)
    GroupRobust(7, Krum(2)).check(14)
    with pytest.raises(UserError, match="at least 1, got 0"):
        assign(4, 0)


def group_sums(rows, present, group_K, groups):
    sums = np.stack([rows[present & (group_K == g)].sum(0) for g in range(groups)])
    return sums, np.bincount(group_K[present], minlength=groups)


_combine_groups = jax.jit(lambda rule, *args: rule.combine_groups(*args), static_argnums=0)


@every
def test_groups_combine_their_means(rule):
    robust = GroupRobust(CLIENTS, rule)
    rows, group_K = draw(9, clients=25), assign(25, CLIENTS)
    present = np.random.default_rng(0).random(25) < 0.7
    present[group_K == 4] = False
    sums, counts = group_sums(rows, present, group_K, CLIENTS)
    assert counts.max() > counts[counts > 0].min()
    means = [
        rows[present & (group_K == g)].astype(np.float64).mean(0) for g in np.flatnonzero(counts)
    ]
    sums[4] = np.nan
    memory = robust.init(SIZE)
    if isinstance(rule, GeometricMedian):
        robust = GroupRobust(CLIENTS, dataclasses.replace(rule, iterations=300))
    out, _ = _combine_groups(robust, jnp.asarray(sums), jnp.asarray(counts, jnp.int32), memory)
    np.testing.assert_allclose(out, oracle(rule, means), rtol=1e-4, atol=2e-5)


@every
def test_malicious_clients_spoil_one_group_each_at_most(rule):
    robust = GroupRobust(CLIENTS, rule)
    group_K = robust.assign(27)
    everyone = np.ones(27, bool)
    for bad in [(0, 1), (0, 9), (26, 13)]:  # in groups of their own and in the same group
        rows = draw(11, clients=27)
        honest = np.delete(rows, bad, axis=0).astype(np.float64)
        rows[list(bad)] = 1e6
        sums, counts = group_sums(rows, everyone, group_K, CLIENTS)
        out, _ = _combine_groups(
            robust, jnp.asarray(sums), jnp.asarray(counts, jnp.int32), robust.init(SIZE)
        )
        diameter = max(np.linalg.norm(x - y) for x in honest for y in honest)
        assert np.linalg.norm(out - honest.mean(0)) < diameter
        assert np.linalg.norm(rows.mean(0) - honest.mean(0)) > 1e3 * diameter
