"""Every poisoned answer is wrong, comes from another class, and does not hang on the row order."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Record, flip_labels
from fedjax_llm.errors import UserError

SEEDS = st.integers()


def record_lists(labels: str | list[str]) -> st.SearchStrategy[list[Record]]:
    """Records with at least two distinct answers."""
    record = st.builds(
        Record,
        prompt=st.sampled_from(["What?", "Why?", ""]),
        answer=st.sampled_from(["yes", "no", "maybe", "Yes"]),
        context=st.sampled_from(["", "passage"]),
        label=st.sampled_from(labels),
        group=st.sampled_from(["", "g"]),
    )
    return st.lists(record, min_size=2, max_size=30).filter(
        lambda records: len({r.answer for r in records}) > 1
    )


RECORDS = record_lists(["", "p", "q", "r"])


@given(records=RECORDS, seed=SEEDS)
def test_every_answer_changes_and_nothing_but_answer_and_label(
    records: list[Record], seed: int
) -> None:
    poisoned = flip_labels(records, seed)
    pairs = {(r.label, r.answer) for r in records}
    for before, after in zip(records, poisoned, strict=True):
        assert after.answer != before.answer
        # Label and answer agree with each other: some record has both.
        assert (after.label, after.answer) in pairs
        assert replace(after, answer=before.answer, label=before.label) == before
        if any(label != before.label and answer != before.answer for label, answer in pairs):
            assert after.label != before.label or len({r.label for r in records}) == 1
    assert poisoned == flip_labels(records, seed)


@given(records=RECORDS, seed=SEEDS, shuffle=st.randoms())
def test_order_of_rows_does_not_matter(
    records: list[Record], seed: int, shuffle: random.Random
) -> None:
    order = list(range(len(records)))
    shuffle.shuffle(order)
    poisoned = flip_labels(records, seed)
    assert flip_labels([records[i] for i in order], seed) == [poisoned[i] for i in order]


def cycle_length(step: dict[str, str]) -> int:
    start = next(iter(step))
    name, length = step[start], 1
    while name != start:
        name, length = step[name], length + 1
    return length


@given(seed=SEEDS, classes=st.integers(2, 8))
def test_labels_go_round_one_cycle(seed: int, classes: int) -> None:
    # Two answers to a label, so that the class decides and not the answer.
    records = [
        Record(f"question {row}", f"answer {row % classes} {row % 2}", label=f"l{row % classes}")
        for row in range(6 * classes)
    ]
    poisoned = flip_labels(records, seed)
    steps = {(before.label, after.label) for before, after in zip(records, poisoned, strict=True)}
    assert len(steps) == classes
    assert cycle_length(dict(steps)) == classes
    assert all(after.answer.split()[1] == after.label[1:] for after in poisoned)


@given(records=record_lists([""]), seed=SEEDS)
def test_without_labels_distinct_answers_are_deranged(records: list[Record], seed: int) -> None:
    poisoned = flip_labels(records, seed)
    steps = {(before.answer, after.answer) for before, after in zip(records, poisoned, strict=True)}
    answers = {record.answer for record in records}
    assert len(steps) == len(answers) == cycle_length(dict(steps))
    assert not any(record.label for record in poisoned)


def test_all_answers_of_a_class_are_used() -> None:
    records = [Record(f"question {row}", f"a{row % 4}", label="p") for row in range(200)]
    records += [Record(f"query {row}", f"b{row % 4}", label="q") for row in range(200)]
    poisoned = flip_labels(records, seed=0)
    assert {record.answer for record in poisoned[:200]} == {"b0", "b1", "b2", "b3"}
    assert {record.answer for record in poisoned[200:]} == {"a0", "a1", "a2", "a3"}


@pytest.mark.parametrize("seed", range(5))
def test_a_label_that_says_the_same_is_passed_over(seed: int) -> None:
    records = [
        Record("1", "yes", label="p"),
        Record("2", "yes", label="q"),
        Record("3", "no", label="r"),
    ]
    poisoned = flip_labels(records, seed)
    assert [(r.answer, r.label) for r in poisoned[:2]] == [("no", "r"), ("no", "r")]
    assert poisoned[2].answer == "yes"
    # Only its own label has a different answer.
    alone = [Record("1", "yes", label="p"), Record("2", "no", label="p"), records[1]]
    assert flip_labels(alone, seed)[0] == Record("1", "no", label="p")


def test_seed_changes_the_cycle() -> None:
    records = [Record("question", f"answer {i}", label=f"l{i}") for i in range(6)]
    assert len({tuple(flip_labels(records, seed)) for seed in range(10)}) > 5


def test_poison_is_the_same_on_every_machine() -> None:
    records = [Record("question", f"answer {i}", label=f"l{i}") for i in range(5)]
    assert [record.label for record in flip_labels(records, 7)] == ["l2", "l0", "l4", "l1", "l3"]
    records = [Record(f"question {i}", f"{i % 2} {i % 4}", label=f"l{i % 2}") for i in range(8)]
    poisoned = [record.answer for record in flip_labels(records, 7)]
    assert poisoned == ["1 1", "0 2", "1 1", "0 0", "1 1", "0 0", "1 3", "0 2"]


def test_fewer_than_two_answers_are_refused() -> None:
    with pytest.raises(UserError, match=r"2 records cannot be poisoned .* all are 'yes'; choose"):
        flip_labels([Record("1", "yes", label="p"), Record("2", "yes", label="q")], 0)
    with pytest.raises(UserError, match="0 records cannot be poisoned"):
        flip_labels([], 0)
