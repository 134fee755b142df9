"""Every record goes to one client, groups stay whole, and skew is what the concentration says."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import (
    ByKey,
    Dirichlet,
    Iid,
    Record,
    Way,
    by_label,
    dirichlet,
    group_key,
    iid,
    partition,
    select,
)
from fedjax_llm.errors import UserError
from fedjax_llm.models.batch import Batch

KEYS = st.lists(st.text("abcde", min_size=1, max_size=2), min_size=1, max_size=40)
SEEDS = st.integers()
Divide = Callable[[Sequence[str], int, int], list[np.ndarray]]
WAYS: tuple[Way, ...] = (Iid(), Dirichlet(concentration=0.3), ByKey(key="label"))
# Pairs of label and group; a group may have several labels.
PAIRS = st.lists(
    st.tuples(st.sampled_from("xyz"), st.integers(0, 15).map(str)), min_size=1, max_size=50
)


def assert_divides(parts: list[np.ndarray], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def owners(parts: list[np.ndarray], keys: Sequence[str]) -> dict[str, set[int]]:
    """The clients that hold rows of each key."""
    result: defaultdict[str, set[int]] = defaultdict(set)
    for client, part in enumerate(parts):
        for row in part:
            result[keys[row]].add(client)
    return dict(result)


def skew(parts: list[np.ndarray], labels: Sequence[str]) -> float:
    """Mean total variation between a client's labels and all, weighted by its rows; in [0, 1]."""
    overall = Counter(labels)
    total = 0.0
    for part in parts:
        own = Counter(labels[row] for row in part)
        distance = sum(
            abs(own[name] / max(len(part), 1) - overall[name] / len(labels)) for name in overall
        )
        total += len(part) / len(labels) * distance / 2
    return total


@given(groups=KEYS, seed=SEEDS, data=st.data())
@pytest.mark.parametrize("divide", [iid, by_label])
def test_whole_keys_are_divided_as_evenly_as_greed_can(
    divide: Divide, groups: list[str], seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(set(groups))))
    parts = divide(groups, clients, seed)
    assert_divides(parts, len(groups), clients)
    assert all(len(held) == 1 for held in owners(parts, groups).values())
    # Each client had the fewest rows when it took its last and smallest key.
    sizes, fewest = Counter(groups), min(map(len, parts))
    for part in parts:
        assert fewest > 0
        assert len(part) - min(sizes[groups[row]] for row in part) <= fewest


@given(groups=KEYS, seed=SEEDS, shuffle=st.randoms(), data=st.data())
@pytest.mark.parametrize("divide", [iid, by_label])
def test_order_of_rows_does_not_move_a_whole_key(
    divide: Divide, groups: list[str], seed: int, shuffle: random.Random, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(set(groups))))
    shuffled = list(groups)
    shuffle.shuffle(shuffled)
    once = divide(groups, clients, seed)
    again = divide(groups, clients, seed)
    assert owners(once, groups) == owners(divide(shuffled, clients, seed), shuffled)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


@given(
    pairs=PAIRS,
    clients=st.integers(1, 5),
    concentration=st.floats(1e-6, 1e6),
    seed=SEEDS,
    grouped=st.booleans(),
    shuffle=st.randoms(),
)
def test_dirichlet_divides_keeps_groups_and_ignores_the_order_of_rows(
    pairs: list[tuple[str, str]],
    clients: int,
    concentration: float,
    seed: int,
    grouped: bool,
    shuffle: random.Random,
) -> None:
    def divide(pairs: list[tuple[str, str]]) -> tuple[list[np.ndarray], list[str], list[str]]:
        labels, groups = [label for label, _ in pairs], [group for _, group in pairs]
        names = groups if grouped else None
        return dirichlet(labels, names, clients, concentration, seed, minimum=0), labels, groups

    parts, labels, groups = divide(pairs)
    assert_divides(parts, len(pairs), clients)
    assert all(np.array_equal(a, b) for a, b in zip(parts, divide(pairs)[0], strict=True))
    shuffled = list(pairs)
    shuffle.shuffle(shuffled)
    again, labels_again, groups_again = divide(shuffled)
    if grouped:
        assert all(len(held) == 1 for held in owners(parts, groups).values())
        assert owners(parts, groups) == owners(again, groups_again)
    else:
        for one, other in zip(parts, again, strict=True):
            assert Counter(labels[i] for i in one) == Counter(labels_again[i] for i in other)


@given(seed=SEEDS, minimum=st.integers(1, 8), clients=st.integers(1, 5))
def test_every_client_gets_its_minimum(seed: int, minimum: int, clients: int) -> None:
    labels = [f"label {row % 4}" for row in range(80)]
    parts = dirichlet(labels, None, clients, 1.0, seed, minimum)
    assert_divides(parts, 80, clients)
    assert min(map(len, parts)) >= minimum


def test_a_draw_that_leaves_a_client_short_is_drawn_again() -> None:
    labels = [f"label {row % 3}" for row in range(60)]
    short = [s for s in range(20) if min(map(len, dirichlet(labels, None, 4, 0.1, s, 0))) == 0]
    assert len(short) > 10
    for seed in short:
        assert min(map(len, dirichlet(labels, None, 4, 0.1, seed))) >= 1


@pytest.mark.parametrize("concentration", [0.1, 0.5, 5.0])
def test_shares_have_the_moments_of_the_dirichlet_distribution(concentration: float) -> None:
    clients, names, rows, draws = 4, 100, 50, 24
    label_N = np.arange(names * rows) % names
    labels = [f"label {label:02}" for label in label_N]
    shares = np.concatenate(
        [
            np.bincount(label_N[part], minlength=names) / rows
            for seed in range(draws)
            for part in dirichlet(labels, None, clients, concentration, seed, minimum=0)
        ]
    )
    variance = (clients - 1) / (clients**2 * (clients * concentration + 1))
    assert np.mean(shares) == pytest.approx(1 / clients)
    # Of 2400 draws; one standard error of the variance is about 2 %.
    assert np.var(shares) == pytest.approx(variance, rel=0.1)


def test_small_concentrations_skew_the_labels_and_large_ones_do_not() -> None:
    labels = [f"label {row % 10}" for row in range(2000)]

    def mean_skew(concentration: float) -> float:
        return float(
            np.mean([skew(dirichlet(labels, None, 5, concentration, s), labels) for s in range(10)])
        )

    tenth, one, hundred = map(mean_skew, (0.1, 1.0, 100.0))
    assert tenth > 0.5 > one > 0.15 > 0.05 > hundred
    # by_label is the limit of small concentrations, iid that of large ones up to sampling.
    assert skew(by_label(labels, 5, 0), labels) == pytest.approx(0.8)
    assert skew(iid([str(row) for row in range(2000)], 5, 0), labels) < 0.1


def test_rows_of_a_label_are_shuffled_before_they_are_cut() -> None:
    first, second = dirichlet(["a"] * 100, None, 2, 1e6, seed=0)
    assert abs(len(first) - len(second)) <= 2
    assert first.min() < second.max() and second.min() < first.max()
    assert np.sum(first < 50) == pytest.approx(25, abs=12)


@pytest.mark.parametrize("mixed", [("a", "a", "b"), ("b", "a"), ("c", "b", "b", "a", "a")])
def test_a_group_of_several_labels_counts_under_the_commonest(mixed: tuple[str, ...]) -> None:
    # In all of them that is "a", the first in alphabetical order among equals.
    rows = len(mixed)
    groups = [str(row // rows) for row in range(60 * rows)]
    found = dirichlet([*mixed * 30, *["b"] * 30 * rows], groups, 3, 0.5, seed=4)
    plain = dirichlet([*["a"] * 30 * rows, *["b"] * 30 * rows], groups, 3, 0.5, seed=4)
    assert all(np.array_equal(one, other) for one, other in zip(found, plain, strict=True))


def test_seed_changes_the_parts() -> None:
    labels = [f"label {row % 5}" for row in range(50)]
    names = [str(row) for row in range(50)]
    for divide in (
        lambda seed: iid(names, 5, seed),
        lambda seed: by_label(labels, 5, seed),
        lambda seed: dirichlet(labels, None, 5, 1.0, seed),
    ):
        assert [p.tolist() for p in divide(1)] != [p.tolist() for p in divide(2)]


def test_largest_label_does_not_always_go_to_the_first_client() -> None:
    labels = ["large"] * 10 + ["small"]
    assert {len(by_label(labels, 2, seed)[0]) for seed in range(10)} == {1, 10}


def test_parts_are_the_same_on_every_machine() -> None:
    names = [f"row {row}" for row in range(8)]
    labels = ["a", "b", "c", "d"] * 2
    assert [part.tolist() for part in iid(names, 3, 7)] == [[2, 3], [1, 4, 6], [0, 5, 7]]
    assert [part.tolist() for part in by_label(labels, 3, 7)] == [[2, 6], [1, 3, 5, 7], [0, 4]]
    assert [part.tolist() for part in dirichlet(labels, None, 3, 1.0, 7)] == [
        [3],
        [0, 1, 5, 7],
        [2, 4, 6],
    ]


def records(count: int = 60) -> list[Record]:
    """Two spellings of each question, which are one group, and three labels."""
    return [
        Record(("Why {}?" if row % 2 else " why  {}?").format(row // 2), "b", label=f"l{row // 20}")
        for row in range(count)
    ]


def test_partition_takes_groups_and_labels_from_the_records() -> None:
    rows = records()
    keys, labels = [group_key(row) for row in rows], [row.label for row in rows]
    expected = [
        iid(keys, 3, 5),
        dirichlet(labels, keys, 3, 0.3, 5),
        by_label(labels, 3, 5),
    ]
    for way, parts in zip(WAYS, expected, strict=True):
        found = partition(rows, 3, way, 5)
        assert_divides(found, 60, 3)
        assert all(np.array_equal(a, b) for a, b in zip(found, parts, strict=True))
        held = owners(found, keys)
        assert len(held) == 30 and all(len(clients) == 1 for clients in held.values())
    assert all(len(clients) == 1 for clients in owners(expected[2], labels).values())


@pytest.mark.parametrize("way", WAYS)
def test_no_records_are_refused(way: Way) -> None:
    with pytest.raises(UserError, match="no record to divide"):
        partition([], 2, way, 0)


def test_too_few_keys_for_the_clients_are_refused() -> None:
    with pytest.raises(UserError, match="3 records in 2 groups cannot be divided among 3 clients"):
        iid(["a", "a", "b"], 3, 0)
    with pytest.raises(UserError, match="2 labels cannot be divided among 3 clients"):
        by_label(["a", "a", "b"], 3, 0)
    with pytest.raises(UserError, match="3 records in 2 groups cannot give 3 clients at least 1"):
        dirichlet(["a"] * 3, ["g", "g", "h"], 3, 1.0, 0)
    with pytest.raises(UserError, match="cannot give 2 clients at least 2 each"):
        dirichlet(["a"] * 3, None, 2, 1.0, 0, minimum=2)


@pytest.mark.parametrize("clients", [0, -1])
def test_number_of_clients_out_of_range_is_refused(clients: int) -> None:
    for divide in (
        lambda: iid(["a"], clients, 0),
        lambda: by_label(["a"], clients, 0),
        lambda: dirichlet(["a"], None, clients, 1.0, 0),
    ):
        with pytest.raises(UserError, match=f"must be at least 1, got {clients}"):
            divide()


@pytest.mark.parametrize("concentration", [0.0, -1.0, float("nan"), float("inf"), 1e7])
def test_concentration_out_of_range_is_refused(concentration: float) -> None:
    with pytest.raises(UserError, match="concentration must be above 0"):
        dirichlet(["a", "b"], None, 2, concentration, 0)


def test_a_minimum_that_no_draw_meets_is_refused() -> None:
    with pytest.raises(UserError, match=r"concentration = 0.001: none of 1000 .* at least 10 rec"):
        dirichlet(["a"] * 100, None, 4, 0.001, 0, minimum=10)
    with pytest.raises(UserError, match="minimum must be at least 0"):
        dirichlet(["a"], None, 1, 1.0, 0, minimum=-1)


def test_select_takes_rows_of_every_array() -> None:
    tokens_BxT = np.arange(24, dtype=np.int32).reshape(6, 4)
    batch = Batch(tokens_BxT, tokens_BxT % 3 == 0, tokens_BxT % 2)
    parts = iid([str(row) for row in range(6)], 2, 0)
    chosen = [select(batch, part) for part in parts]
    for array, first, second in zip(batch, *chosen, strict=True):
        assert first.dtype == array.dtype
        back = np.empty_like(array)
        back[parts[0]], back[parts[1]] = first, second
        assert np.array_equal(back, array)
    assert select(batch, np.array([], np.int64)).tokens_BxT.shape == (0, 4)
    with pytest.raises(IndexError):
        select(batch, np.array([6]))
