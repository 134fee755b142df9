"""Label skew of given sizes, shards, and whole keys."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import (
    ByKey,
    Dirichlet,
    Iid,
    Quantity,
    Record,
    Shards,
    Way,
    by_key,
    by_shards,
    dirichlet_to_size,
    partition,
)
from fedjax_llm.data.partition import EmptyClient
from fedjax_llm.errors import UserError

SEEDS = st.integers(0, 2**32)
LABELS = st.lists(st.sampled_from("wxyz"), min_size=1, max_size=60)


def skew(parts: list[np.ndarray], labels: list[str]) -> float:
    """Mean total variation of the clients' labels from the whole, for clients of one size."""
    names = sorted(set(labels))
    whole_L = np.array([labels.count(name) for name in names]) / len(labels)
    own_KxL = np.array([[[labels[r] for r in p].count(n) / len(p) for n in names] for p in parts])
    return float(np.abs(own_KxL - whole_L).sum(axis=1).mean() / 2)


def test_concentration_moves_labels_and_not_sizes() -> None:
    labels = [f"label {row % 10}" for row in range(1000)]
    shares = [5.0, 3.0, 2.0]

    def mean_skew(concentration: float) -> float:
        found = []
        for seed in range(5):
            parts = dirichlet_to_size(labels, None, 3, concentration, seed, shares=shares)
            assert [len(part) for part in parts] == [500, 300, 200]
            found.append(skew(parts, labels))
        return float(np.mean(found))

    tenth, ten, thousand = map(mean_skew, (0.1, 10.0, 1000.0))
    assert tenth > 0.4 > ten > 0.15 > 0.1 > thousand


def test_proportions_have_the_moments_of_the_dirichlet_distribution() -> None:
    # Until three quarters are dealt few labels have run out: most of a draw shows unchanged.
    labels = [f"label {row % 4}" for row in range(2000)]
    shares = [1.0, 9.0]
    draws = [
        [labels[row] for row in dirichlet_to_size(labels, None, 2, 2.0, seed, shares=shares)[0]]
        for seed in range(60)
    ]
    share_DxL = np.array([[draw.count(f"label {n}") / 200 for n in range(4)] for draw in draws])
    assert {len(draw) for draw in draws} == {200}
    # Dirichlet(2 * [1/4] * 4): variance p (1 - p) / (1 + 2), and that of 200 samples of it.
    variance = 0.25 * 0.75 / 3
    variance += (0.25 * 0.75 - variance) / 200
    assert share_DxL.mean() == pytest.approx(0.25)
    assert np.var(share_DxL) == pytest.approx(variance, rel=0.3)


@given(labels=LABELS, clients=st.integers(1, 5), seed=SEEDS, concentration=st.floats(1e-6, 1e6))
def test_sized_dirichlet_uses_every_row_once(
    labels: list[str], clients: int, seed: int, concentration: float
) -> None:
    clients = min(clients, len(labels))
    parts = dirichlet_to_size(labels, None, clients, concentration, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(
    pairs=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 15).map(str)), min_size=20),
    seed=SEEDS,
    shuffle=st.randoms(),
)
def test_sized_dirichlet_and_shards_ignore_the_order_of_rows(
    pairs: list[tuple[str, str]], seed: int, shuffle: random.Random
) -> None:
    def owners(pairs: list[tuple[str, str]]) -> list[dict[str, int] | str]:
        labels, groups = [label for label, _ in pairs], [group for _, group in pairs]
        found: list[dict[str, int] | str] = []
        for divide in (
            lambda: dirichlet_to_size(labels, groups, 2, 0.5, seed, shares=[2.0, 1.0]),
            lambda: by_shards(labels, groups, 2, 1, seed),
        ):
            try:
                parts = divide()
            except UserError as error:
                found.append(str(error))
            else:
                found.append({groups[row]: c for c, part in enumerate(parts) for row in part})
        return found

    shuffled = list(pairs)
    shuffle.shuffle(shuffled)
    assert owners(pairs) == owners(shuffled)


@given(
    labels=LABELS,
    clients=st.integers(1, 5),
    shards=st.integers(1, 4),
    seed=SEEDS,
)
def test_shards_are_equal_runs_of_the_rows_sorted_by_label(
    labels: list[str], clients: int, shards: int, seed: int
) -> None:
    count = clients * shards
    if count > len(labels):
        with pytest.raises(UserError, match=f"do not divide into {clients} x {shards} shards"):
            by_shards(labels, None, clients, shards, seed)
        return
    parts = by_shards(labels, None, clients, shards, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    # S shards of at least the rounded-down size each, and at most the rounded-up size.
    low, high = len(labels) // count, -(-len(labels) // count)
    assert all(shards * low <= len(part) <= shards * high for part in parts)
    # Sorted by label, a run of rows meets few labels: the joints between labels and the shards.
    joints = len(set(labels)) - 1
    assert sum(len({labels[row] for row in part}) for part in parts) <= count + joints


def test_shards_of_mcmahan() -> None:
    # 60,000 rows of ten digits, 100 clients, two shards of 300 rows each.
    labels = [str(digit) for digit in range(10) for _ in range(6000)]
    parts = by_shards(labels, None, 100, 2, 1)
    assert {len(part) for part in parts} == {600}
    held = [Counter(labels[row] for row in part) for part in parts]
    assert all(set(own.values()) <= {300, 600} for own in held)
    assert Counter(len(own) for own in held)[2] > 80


def test_rows_of_a_label_are_shuffled_before_they_become_shards() -> None:
    first, _ = by_shards(["a"] * 100, None, 2, 1, 0)
    assert 10 < np.sum(first < 50) < 40


def test_a_group_larger_than_a_shard_is_named() -> None:
    groups = ["large"] * 18 + ["one", "two"]
    with pytest.raises(UserError, match="the largest group, of size 18, would leave a shard of"):
        by_shards(["a"] * 18 + ["b", "b"], groups, 3, 1, 0)
    assert len(by_shards(["a"] * 20, None, 3, 1, 0)) == 3


@pytest.mark.parametrize("shards", [0, -2])
def test_no_shard_is_refused(shards: int) -> None:
    with pytest.raises(UserError, match=f"at least 1 for each client, got {shards}"):
        by_shards(["a", "b"], None, 2, shards, 0)


@given(keys=st.lists(st.text("abc", max_size=2), min_size=1, max_size=40), seed=SEEDS)
def test_every_key_a_client_of_its_own(keys: list[str], seed: int) -> None:
    parts = by_key(keys, None, seed)
    for key, part in zip(sorted(set(keys)), parts, strict=True):
        assert [row for row, own in enumerate(keys) if own == key] == part.tolist()


def test_a_group_of_two_keys_cannot_stay_whole_with_them() -> None:
    keys, groups = ["ann", "bob", "bob"], ["g", "g", "h"]
    with pytest.raises(UserError, match="'g' has rows of the users 'ann' and 'bob'"):
        by_key(keys, 2, 0, name="user", groups=groups)
    assert sorted(map(len, by_key(keys, 2, 0))) == [1, 2]


def test_too_few_keys_are_refused() -> None:
    with pytest.raises(UserError, match="2 users cannot be divided among 3 clients"):
        by_key(["ann", "bob", "ann"], 3, 0, name="user")


def records(count: int = 120) -> list[Record]:
    """Questions in two spellings, of three labels, four users and two sources."""
    return [
        Record(
            ("Why {}?" if row % 2 else " why  {}?").format(row // 2),
            "because",
            label=f"label {row // 2 % 3}",
            user="" if row < 60 else f"user {row // 2}",
            source=f"file {row // 60}",
        )
        for row in range(count)
    ]


WAYS = (
    Iid(),
    Quantity(concentration=1.0),
    Quantity(exponent=1.0),
    Dirichlet(concentration=1.0),
    ByKey(key="label"),
    ByKey(key="source", granularity="rows"),
    Shards(shards=1),
)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_gives_every_record_to_one_client_and_keeps_groups(way: Way) -> None:
    rows = records()
    clients = 2
    parts = partition(rows, clients, way, seed=4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    assert all(part.dtype == np.int64 and len(part) for part in parts)
    holders = defaultdict(set)
    for client, part in enumerate(parts):
        for row in part:
            holders[rows[row].user or " ".join(rows[row].prompt.casefold().split())].add(client)
    assert all(len(held) == 1 for held in holders.values())
    others = partition(rows, clients, way, seed=5)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, others, strict=True)) or isinstance(
        way, ByKey
    )


def test_single_rows_part_groups_that_stay_whole_otherwise() -> None:
    rows = [Record("why?", "because", label="a") for _ in range(40)]
    for way in (Iid(granularity="rows"), Dirichlet(concentration=100.0, granularity="rows")):
        assert sum(map(len, partition(rows, 2, way, 0))) == 40
    with pytest.raises(UserError, match="40 records in 1 groups cannot be divided among 2"):
        partition(rows, 2, Iid(), 0)


def test_shares_and_sizes_reach_the_ways_that_take_them() -> None:
    rows = records()
    sizes = [1 + row % 7 for row in range(len(rows))]
    for way in (Iid(granularity="rows"), Dirichlet(granularity="rows")):
        first, second = partition(rows, 2, way, 0, shares=[3.0, 1.0], sizes=sizes)
        total = sum(sizes)
        assert sum(sizes[row] for row in first) == pytest.approx(0.75 * total, abs=7)
        assert sum(sizes[row] for row in second) == pytest.approx(0.25 * total, abs=7)


@pytest.mark.parametrize("way", [Quantity(), Shards()], ids=str)
def test_ways_with_sizes_of_their_own_refuse_shares(way: Way) -> None:
    with pytest.raises(UserError, match="so that shares have no meaning; leave balance out"):
        partition(records(), 2, way, 0, shares=[2.0, 1.0])


@pytest.mark.parametrize(
    ("way", "key"),
    [
        (Dirichlet(), "label"),
        (Shards(), "label"),
        (ByKey(key="user"), "user"),
        (ByKey(key="source"), "source"),
    ],
    ids=str,
)
def test_a_field_that_no_record_has_is_named(way: Way, key: str) -> None:
    rows = [Record(f"question {row}", "answer") for row in range(10)]
    with pytest.raises(
        UserError, match=f"none of the 10 records has a {key}; set {key} in the map"
    ):
        partition(rows, 2, way, 0)


def test_case_and_spacing_do_not_make_two_users() -> None:
    rows = [
        Record(
            f"question {row}", "answer", user=("Ann", " ann", "BOB")[row % 3], label="ab"[row % 2]
        )
        for row in range(30)
    ]
    parts = partition(rows, 2, ByKey(key="user"), 0)
    assert sorted({rows[row].user for row in part} == {"BOB"} for part in parts) == [False, True]
    with pytest.raises(UserError, match="2 users cannot be divided among 3 clients"):
        partition(rows, 3, ByKey(key="user"), 0)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"key must be one of label, user, .*, got 'topic'"):
        partition(records(), 2, ByKey(key="topic"), 0)


def test_an_empty_client_is_one_line_with_its_place() -> None:
    with pytest.raises(EmptyClient) as caught:
        partition(records(), 2, ByKey(key="source", granularity="rows"), 0, shares=[1.0, 1e-9])
    assert caught.value.client == 1 and "\n" not in str(caught.value)
