"""Sizes: every client ends within one unit of its target, whatever is dealt and to whom."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import by_key, by_quantity, dirichlet_to_size, iid
from fedjax_llm.data.partition import EmptyClient, deal, power_law_shares, targets
from fedjax_llm.errors import UserError

SEEDS = st.integers(0, 2**32)
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=60)
SHARES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)
# A function of units, one of each row, clients, seed, shares and sizes.
Shares = Sequence[float] | None
Divide = Callable[[Sequence[str], int, int, Shares, Sequence[int]], list[np.ndarray]]


def _iid(
    units: Sequence[str], clients: int, seed: int, shares: Shares, sizes: Sequence[int]
) -> list[np.ndarray]:
    return iid(units, clients, seed, shares=shares, sizes=sizes)


def _keys(
    units: Sequence[str], clients: int, seed: int, shares: Shares, sizes: Sequence[int]
) -> list[np.ndarray]:
    return by_key(units, clients, seed, shares=shares, sizes=sizes)


def _dirichlet(
    units: Sequence[str], clients: int, seed: int, shares: Shares, sizes: Sequence[int]
) -> list[np.ndarray]:
    labels = [unit[-1] for unit in units]
    return dirichlet_to_size(labels, units, clients, 0.3, seed, shares=shares, sizes=sizes)


@given(sizes=SIZES, shares=SHARES, seed=SEEDS)
def test_deal_ends_within_its_bound_in_any_order(
    sizes: list[int], shares: list[float], seed: int
) -> None:
    target_K = targets(sum(sizes), len(shares), shares)
    load_K = np.zeros(len(shares))
    np.add.at(load_K, deal(sizes, target_K, seed), sizes)
    bound = (len(shares) - 1) / len(shares) * max(sizes)
    assert np.abs(load_K - target_K).max() <= bound + 1e-6


def test_a_small_target_is_not_overrun_on_the_way() -> None:
    # Always the one furthest behind its share of what is dealt so far: the middle client gets a
    # unit before the others are full, and one of them ends 0.82 units below its target.
    target_K = targets(24, 3, [32.0, 1.0, 32.0])
    for seed in range(10):
        load_K = np.bincount(deal([1] * 24, target_K, seed), minlength=3)
        assert np.abs(load_K - target_K).max() <= 2 / 3


def test_the_bound_of_deal_is_reached() -> None:
    # One unit and K equal targets: its client ends at (K - 1) / K of it above.
    target_K = targets(12, 4, None)
    (client,) = deal([12], target_K, 0)
    assert 12 - target_K[client] == pytest.approx(3 / 4 * 12)


@given(
    units=st.lists(st.integers(0, 40).map(str), min_size=1, max_size=60),
    shares=SHARES,
    seed=SEEDS,
    data=st.data(),
)
@pytest.mark.parametrize("divide", [_iid, _keys, _dirichlet])
def test_loads_follow_shares_to_within_the_largest_unit(
    divide: Divide, units: list[str], shares: list[float], seed: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=len(units), max_size=len(units)))
    size_of: Counter[str] = Counter()
    for unit, size in zip(units, sizes, strict=True):
        size_of[unit] += size
    clients = min(len(shares), len(size_of))
    shares = shares[:clients]
    try:
        parts = divide(units, clients, seed, shares, sizes)
    except EmptyClient as error:
        # Only a target within the largest unit may leave a client without one.
        if sum(sizes) * shares[error.client] / sum(shares) > max(size_of.values()):
            raise
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(units)))
    owner = {units[row]: client for client, part in enumerate(parts) for row in part}
    for client, part in enumerate(parts):
        assert len(part) and all(owner[units[row]] == client for row in part)
        target = sum(sizes) * shares[client] / sum(shares)
        assert abs(sum(sizes[row] for row in part) - target) <= max(size_of.values())


@given(units=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=60), seed=SEEDS)
def test_equal_shares_in_any_unit_are_no_shares(units: list[str], seed: int) -> None:
    clients = min(3, len(set(units)))
    for divide in (_iid, _keys, _dirichlet):
        plain = divide(units, clients, seed, None, [1] * len(units))
        for share in (1.0, 1e-3, 1e308):
            found = divide(units, clients, seed, [share] * clients, [1] * len(units))
            assert all(np.array_equal(a, b) for a, b in zip(plain, found, strict=True))


@given(seed=SEEDS, shuffle=st.randoms())
def test_shares_stay_with_their_clients_whatever_the_order_of_rows(
    seed: int, shuffle: random.Random
) -> None:
    units = [str(row // 3) for row in range(90)]
    shuffled = list(units)
    shuffle.shuffle(shuffled)
    once = _iid(units, 3, seed, [5.0, 3.0, 1.0], [1] * 90)
    again = _iid(shuffled, 3, seed, [5.0, 3.0, 1.0], [1] * 90)
    for one, other in zip(once, again, strict=True):
        assert {units[row] for row in one} == {shuffled[row] for row in other}
    assert [len(part) for part in once] == pytest.approx([50, 30, 10], abs=3)


def test_tokens_are_balanced_where_rows_are_not() -> None:
    sizes = [1] * 100 + [99] * 10
    names = [str(row) for row in range(110)]
    parts = iid(names, 2, 0, sizes=sizes)
    assert [sum(sizes[row] for row in part) for part in parts] == [545, 545]
    # Counted in rows, 55 rows each, the tokens differ.
    assert [len(part) for part in iid(names, 2, 0)] == [55, 55]


def test_a_large_share_does_not_bring_the_large_groups() -> None:
    # 200 groups of one row and 20 of ten; the first client has four fifths of the rows.
    units = [f"one {row}" for row in range(200)] + [f"ten {row // 10}" for row in range(200)]
    held = []
    for seed in range(20):
        first, _ = iid(units, 2, seed, shares=[4.0, 1.0])
        held.append(sum(units[row].startswith("ten") for row in first) / len(first))
    # The largest first would give it all 20 large groups: 200 of 320 rows.
    assert np.mean(held) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 0.0], "the share of client 2 must be positive and finite, got 0"),
        ([-1.0, 2.0], "the share of client 1 must be positive and finite, got -1"),
        ([1.0, float("nan")], "client 2 must be positive and finite, got nan"),
        ([float("inf"), 1.0], "client 1 must be positive and finite, got inf"),
        ([1.0], "1 shares for 2 clients; give one positive number for each"),
    ],
)
@pytest.mark.parametrize("divide", [_iid, _keys, _dirichlet])
def test_shares_that_mean_nothing_are_refused(
    divide: Divide, shares: list[float], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        divide([str(row) for row in range(10)], 2, 0, shares, [1] * 10)


def test_a_share_too_small_for_a_group_names_the_client() -> None:
    with pytest.raises(
        EmptyClient, match=r"client 2 of 3 would come out empty: its share of 0\.10"
    ):
        iid([str(row) for row in range(20)], 3, 0, shares=[1.0, 0.002, 1.0])


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_a_mistake_of_the_caller(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        iid(["a", "b"], 2, 0, sizes=[1, size])


@given(
    seed=SEEDS,
    exponent=st.floats(0, 2),
    clients=st.integers(1, 6),
    groups=st.lists(st.integers(0, 60).map(str), min_size=150, max_size=150),
)
def test_power_law_sizes_are_the_law_to_within_a_group(
    seed: int, exponent: float, clients: int, groups: list[str]
) -> None:
    law = sorted((rank**-exponent for rank in range(1, clients + 1)), reverse=True)
    share_K = power_law_shares(clients, exponent, seed)
    assert sorted(share_K, reverse=True) == pytest.approx([weight / sum(law) for weight in law])
    largest = max(Counter(groups).values())
    try:
        parts = by_quantity(groups, clients, seed, exponent=exponent)
    except EmptyClient as error:
        if share_K[error.client] * len(groups) > largest:
            raise
        return
    for part, share in zip(parts, share_K, strict=True):
        assert abs(len(part) - share * len(groups)) <= largest


def test_the_seed_decides_which_client_is_the_largest() -> None:
    largest = {int(np.argmax(power_law_shares(3, 1.0, seed))) for seed in range(20)}
    assert largest == {0, 1, 2}


@pytest.mark.parametrize("concentration", [0.5, 2.0, 10.0])
def test_drawn_sizes_have_the_moments_of_the_dirichlet_distribution(concentration: float) -> None:
    clients, rows = 4, 500
    names = [str(row) for row in range(rows)]
    shares = np.array(
        [
            [
                len(part) / rows
                for part in by_quantity(names, clients, s, concentration=concentration)
            ]
            for s in range(60)
        ]
    )
    variance = (clients - 1) / (clients**2 * (clients * concentration + 1))
    assert np.mean(shares) == pytest.approx(1 / clients)
    # 240 dependent numbers: one standard error of the variance is about 10 percent.
    assert np.var(shares) == pytest.approx(variance, rel=0.35)


def test_drawn_sizes_leave_labels_alike() -> None:
    labels = [row % 4 for row in range(4000)]
    parts = by_quantity([str(row) for row in range(4000)], 3, 7, concentration=0.5)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    for part in parts:
        share_L = np.bincount([labels[row] for row in part], minlength=4) / len(part)
        assert share_L == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / len(part)))


def test_every_drawn_client_has_a_row_and_hopeless_draws_are_refused() -> None:
    names = [str(row) for row in range(6)]
    for seed in range(10):
        assert min(map(len, by_quantity(names, 4, seed, concentration=0.3))) >= 1
    with pytest.raises(UserError, match=r"0\.001: none of 1000 draws gave each of 4 clients"):
        by_quantity(names, 4, 0, concentration=0.001)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({"exponent": -1.0}, r"exponent must be in \[0, 30\], got -1"),
        ({"exponent": float("nan")}, r"exponent must be in \[0, 30\], got nan"),
        ({"concentration": 0.0}, "concentration must be above 0"),
        ({}, "either concentration or exponent, neither given"),
        ({"concentration": 1.0, "exponent": 1.0}, "either concentration or exponent, both given"),
        ({"exponent": 8.0}, r"at exponent = 8 its share of .* is too small for a group"),
    ],
)
def test_laws_that_cannot_be_are_refused(law: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        by_quantity([str(row) for row in range(20)], 5, 0, **law)
    assert "\n" not in str(caught.value)
