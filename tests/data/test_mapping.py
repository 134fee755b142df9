"""Mapping makes the common record out of any schema and counts what it drops."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Mapping, Record, map_rows, map_rows_counted, normalise_text
from fedjax_llm.errors import UserError


def test_columns_templates_lists_and_dictionaries() -> None:
    row = {"q": " Which? ", "opts": ["A. x", "B. y"], "more": {"C": "z"}, "ans": "A", "n": None}
    mapping = Mapping(
        prompt="Q: {q}\n{opts}\n{more}", answer="ans", context="n", group="{{{q}}}", label="ans"
    )
    assert map_rows([row], mapping) == [
        Record(
            prompt="Q:  Which? \nA. x\nB. y\nC. z", answer="A", context="", label="A",
            group="{ Which? }",
        )
    ]  # fmt: skip


@pytest.mark.parametrize("key", [0, "0"])
@pytest.mark.parametrize("cell", [0, "0"])
def test_values_translate_labels_of_either_type(key: Any, cell: Any) -> None:
    mapping = Mapping(prompt="t", answer="It is {y}.", values={"y": {key: "negative"}})
    assert map_rows([{"t": "x", "y": cell}], mapping)[0].answer == "It is negative."


def test_untranslated_value_names_row_and_known_values() -> None:
    mapping = Mapping(answer="y", values={"y": {0: "no", 1: "yes"}})
    with pytest.raises(UserError, match=r"row 2 has y = '2'.*it knows 0, 1"):
        map_rows([{"y": 0}, {"y": 2}], mapping)


def test_unknown_column_names_columns_and_nearest() -> None:
    with pytest.raises(UserError) as info:
        map_rows([{"question": "a", "response": "b"}], Mapping(prompt="qestion", answer="response"))
    assert str(info.value) == (
        "mapping: no column 'qestion'; the rows have question, response; did you mean 'question'?"
    )


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a!r}", "{a:>9}", "{ }"])
def test_malformed_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="is not a template"):
        map_rows([{"a": "b"}], Mapping(answer=template))


def test_a_template_reaches_no_attributes() -> None:
    with pytest.raises(UserError, match=r"no column 'a\.__class__'"):
        map_rows([{"a": "b"}], Mapping(answer="{a.__class__}"))


def test_empty_answer_column_is_refused() -> None:
    with pytest.raises(UserError, match="answer is empty"):
        map_rows([{"a": "b"}], Mapping(answer=""))


def test_half_a_surrogate_pair_names_the_row() -> None:
    with pytest.raises(UserError, match="row 1: column 'a'"):
        map_rows([{"a": "\ud800"}], Mapping(answer="a"))


CELLS = st.sampled_from(["", "  ", "x", " y "]) | st.none()
ROWS = st.lists(st.fixed_dictionaries({}, optional={"q": CELLS, "a": CELLS}), max_size=20)


@given(rows=ROWS)
def test_every_row_is_a_record_or_counted(rows: list[dict[str, Any]]) -> None:
    rows = [{"q": "x", "a": "x"}, *rows]
    records, report = map_rows_counted(rows, Mapping(prompt="{q}?", answer="a"))
    assert report.rows == len(rows)
    assert report.records == len(records)
    assert report.rows == report.records + report.empty_answers + report.empty_prompts
    assert all(record.answer and record.prompt != "?" for record in records)
    for column in "qa":
        assert report.missing.get(column, 0) == sum(column not in row for row in rows)


@given(text=st.text())
def test_normalising_is_idempotent_nfc_and_stripped(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    assert "\r" not in once
