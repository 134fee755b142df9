"""No group is on both sides, and the sides do not depend on the order of the rows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Record, group_key, split_by_group
from fedjax_llm.errors import UserError

RECORDS = st.lists(
    st.builds(
        Record,
        prompt=st.sampled_from(["What is it?", "what  IS it?", "Why?", "How?", "Where?"]),
        answer=st.sampled_from("abcd"),
        group=st.sampled_from(["", "", "g", "h"]),
    ),
    min_size=1,
    max_size=30,
).filter(lambda records: len({group_key(r) for r in records}) >= 2)
FRACTIONS = st.floats(0.01, 0.99)


@given(records=RECORDS, fraction=FRACTIONS, seed=st.integers())
def test_sides_share_no_group_and_lose_no_record(
    records: list[Record], fraction: float, seed: int
) -> None:
    train, evaluation = split_by_group(records, fraction, seed)
    assert train and evaluation
    assert not {group_key(r) for r in train} & {group_key(r) for r in evaluation}
    assert sorted(map(repr, train + evaluation)) == sorted(map(repr, records))


@given(records=RECORDS, fraction=FRACTIONS, seed=st.integers(), shuffle=st.randoms())
def test_order_of_rows_does_not_matter(
    records: list[Record], fraction: float, seed: int, shuffle: random.Random
) -> None:
    _, evaluation = split_by_group(records, fraction, seed)
    shuffled = list(records)
    shuffle.shuffle(shuffled)
    _, again = split_by_group(shuffled, fraction, seed)
    assert {group_key(r) for r in evaluation} == {group_key(r) for r in again}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_fraction_is_met_within_half_a_group(fraction: float) -> None:
    records = [Record(f"question {i // 4}", f"answer {i}") for i in range(400)]
    _, evaluation = split_by_group(records, fraction, seed=3)
    assert abs(len(evaluation) - fraction * 400) <= 2


def test_seed_changes_the_sides_and_the_same_seed_does_not() -> None:
    records = [Record(f"question {i}", "answer") for i in range(100)]
    assert split_by_group(records, 0.2, 1) == split_by_group(records, 0.2, 1)
    assert split_by_group(records, 0.2, 1) != split_by_group(records, 0.2, 2)


def test_sides_are_the_same_on_every_machine() -> None:
    records = [Record(f"question {i}", "answer") for i in range(12)]
    _, evaluation = split_by_group(records, 0.25, 7)
    assert [r.prompt for r in evaluation] == ["question 2", "question 7", "question 10"]


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(UserError, match="no record to split"):
        split_by_group([], 0.1, 0)
    with pytest.raises(UserError, match=r"all 2 records form one group \('same'\)"):
        split_by_group([Record("Same", "a"), Record(" same", "b")], 0.1, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="eval_fraction"):
        split_by_group([Record("a", "b"), Record("c", "d")], fraction, 0)
