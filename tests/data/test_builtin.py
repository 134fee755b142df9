"""Embedded corpora: three schemas, distinct rows, short answers, natural groups."""

from collections import defaultdict

import pytest

from fedjax_llm.data import (
    BUILTIN_NAMES,
    builtin_capacity,
    builtin_mapping,
    builtin_rows,
    describe,
    group_key,
    map_rows,
    map_rows_counted,
    render_all,
)  # fmt: skip
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer


def test_there_are_three_corpora_with_three_schemas() -> None:
    assert BUILTIN_NAMES == ("medical", "finance", "general")
    columns = [set(builtin_rows(name, 1, 0)[0]) for name in BUILTIN_NAMES]
    for i in range(3):
        assert not columns[i] & columns[(i + 1) % 3]


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_rows_are_distinct_and_complete(name: str) -> None:
    count = builtin_capacity(name)
    assert count >= 2000
    rows = builtin_rows(name, count, seed=5)
    assert len({tuple(row.items()) for row in rows}) == count
    records, report = map_rows_counted(rows, builtin_mapping(name))
    assert report.records == count and not report.missing
    assert len({(r.prompt, r.answer) for r in records}) == count
    assert all(r.group for r in records)
    assert not any("{" in r.prompt + r.answer for r in records)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_one_question_has_one_answer(name: str) -> None:
    answers = defaultdict(set)
    for record in map_rows(builtin_rows(name, builtin_capacity(name), 0), builtin_mapping(name)):
        answers[record.prompt].add(record.answer)
    assert all(len(texts) == 1 for texts in answers.values())


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_rows_depend_on_the_seed_only(name: str) -> None:
    rows = builtin_rows(name, 300, seed=1)
    assert rows == builtin_rows(name, 300, seed=1)
    assert rows[:100] == builtin_rows(name, 100, seed=1)
    assert rows != builtin_rows(name, 300, seed=2)
    rows[0].clear()  # what the caller does to its rows is not seen by the next caller
    assert builtin_rows(name, 1, seed=1)[0]


def test_paraphrases_share_a_group() -> None:
    for name in BUILTIN_NAMES:
        records = map_rows(builtin_rows(name, builtin_capacity(name), 0), builtin_mapping(name))
        groups = {group_key(r) for r in records}
        assert 100 < len(groups) <= len(records) / 4


def test_finance_labels_are_balanced_numbers() -> None:
    labels = [row["sentiment"] for row in builtin_rows("finance", 1500, 0)]
    assert set(labels) == {0, 1, 2}
    assert min(map(labels.count, (0, 1, 2))) > 400


def test_arithmetic_is_right() -> None:
    for row in builtin_rows("general", builtin_capacity("general"), 0):
        if row["category"] in ("sum", "difference"):
            one, sign, two = row["input"].split()
            expected = int(one) + int(two) * (1 if sign == "+" else -1)
            assert row["output"] == f"Answer: {expected}."


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_examples_fit_64_tokens_of_smollm2(name: str, smollm2_tokenizer: Tokenizer) -> None:
    records = map_rows(builtin_rows(name, 2000, 0), builtin_mapping(name))
    for system in ("Answer briefly.", None):
        rendered, report = render_all(records, smollm2_tokenizer, "chat", 64, system)
        assert report.kept == 2000 and report.answer_cut == 0
    assert describe(rendered).target_quantiles[-1] <= 20


def test_mistakes_name_the_cure() -> None:
    with pytest.raises(UserError, match="use one of medical, finance, general"):
        builtin_rows("law", 1, 0)
    with pytest.raises(UserError, match="no embedded corpus 'law'"):
        builtin_mapping("law")
    for count in (0, 10**6):
        with pytest.raises(UserError, match=f"rows, got {count}"):
            builtin_rows("medical", count, 0)
