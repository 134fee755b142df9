"""Mappings are suggested for schemas that people use, and what is suggested can be loaded."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedjax_llm import cli
from fedjax_llm.data import Mapping, builtin_mapping, builtin_rows, map_rows, read_rows
from fedjax_llm.data.harmonise import inspect_rows, open_conversations, suggest_mapping

QUESTIONS = ["What is asthma?", "How is gout treated?", "Who invented glass?", "Why do we sleep?"]
ANSWERS = [
    "A chronic disease of the airways in which they narrow.",
    "With drugs that lower the uric acid in the blood.",
    "Nobody knows; the oldest pieces are from Egypt.",
    "So that the brain can rest and sort the day.",
]
PASSAGES = ["A long passage about the matter that goes on and on. " * 5 + str(i) for i in range(4)]


def columns(**cells: list[Any]) -> list[dict[str, Any]]:
    names = list(cells)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*cells.values(), strict=True)]
    return [dict(row) for row in rows * 3]


SCHEMAS = {
    "alpaca": (
        columns(instruction=QUESTIONS, input=["x", "y", "", "z"], output=ANSWERS),
        {"prompt": "instruction", "context": "input", "answer": "output"},
    ),
    "reading": (
        columns(id=["1", "2", "3", "4"], passage=PASSAGES, question=QUESTIONS, answer=ANSWERS),
        {"prompt": "question", "context": "passage", "answer": "answer"},
    ),
    "sentiment": (
        columns(sentence=ANSWERS, sentiment=["good", "bad", "good", "bad"]),
        {"prompt": "sentence", "answer": "sentiment", "label": "sentiment"},
    ),
    "other words": (
        columns(UserId=["u1", "u1", "u2", "u2"], query=QUESTIONS, completion=ANSWERS),
        {"prompt": "query", "answer": "completion", "user": "UserId"},
    ),
    "unnamed": (
        columns(c1=QUESTIONS, response_text=ANSWERS),
        {"prompt": "c1", "answer": "response_text"},
    ),
    "plain text": (columns(text=PASSAGES), {"answer": "text"}),
    "forum": (
        columns(title=QUESTIONS, body=PASSAGES, dataset=["a", "b", "a", "b"]),
        {"prompt": "title", "answer": "body", "source": "dataset"},
    ),
    "chat": (
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ],
        {"prompt": "messages.prompt", "answer": "messages.answer"},
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_common_schemas_are_recognised_and_their_mapping_loads(name: str) -> None:
    rows, expected = SCHEMAS[name]
    suggestion = suggest_mapping(rows)
    assert {choice.field: choice.column for choice in suggestion.choices} == expected
    table = tomllib.loads(suggestion.toml())["mapping"]
    assert table == expected
    records = map_rows(open_conversations(rows), Mapping(**table))
    assert len(records) == len(rows) and all(record.answer for record in records)
    assert all(0 < choice.confidence <= 1 and choice.reason for choice in suggestion.choices)


@pytest.mark.parametrize("name", ["medical", "finance", "general"])
def test_the_embedded_schemas_are_recognised(name: str) -> None:
    found = {c.field: c.column for c in suggest_mapping(builtin_rows(name, 200, 0)).choices}
    known = builtin_mapping(name)
    assert found["prompt"] in known.prompt
    assert found["answer"] in known.answer


def test_the_suggestion_does_not_depend_on_the_order_of_columns_without_ties() -> None:
    rows, expected = SCHEMAS["reading"]
    turned = [dict(reversed(row.items())) for row in rows]
    found = {c.field: c.column for c in suggest_mapping(turned).choices}
    assert found == expected


def test_conversations_are_opened_at_their_last_answer() -> None:
    row = {
        "chat": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "So."},
            {"from": "human", "value": "Thanks"},
        ],
        "id": 1,
    }
    (opened,) = open_conversations([row])
    assert {k: v for k, v in opened.items() if k.startswith("chat.")} == {
        "chat.prompt": "Why?",
        "chat.answer": "So.",
        "chat.context": "user: Hi\nassistant: Hello",
        "chat.system": "Be kind.",
    }
    assert opened["chat"] == row["chat"] and opened["id"] == 1
    for other in ([{"options": ["a", "b"]}], [{"chat": [{"role": "cat", "content": "?"}]}], []):
        assert open_conversations(other) == other


def test_an_inspection_counts_what_is_there(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is the answer to case number {i}?", "answer": "It is so.", "label": "a"}
        for i in range(4)
    ]
    rows += [dict(rows[0]), rows[1] | {"answer": " "}, rows[2] | {"label": "b", "question": " "}]
    found = inspect_rows("x", rows)
    assert found.mapping is not None
    assert (found.mapping.rows, found.mapping.empty_answers, found.mapping.empty_prompts) == (
        7,
        1,
        1,
    )
    assert found.exact_duplicates == 1
    assert found.labels == {"a": 5} and sum(found.languages.values()) == 5
    assert found.lengths["answer"] == (9, 9, 9)


def test_the_command_prints_a_mapping_that_reads_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cloud.csv"
    file.write_text("Question,Response\nWhat is gout?,A disease of the joints.\nWhy?,So it is.\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", str(file)])
    output = capsys.readouterr().out
    assert not ended.value.code
    line = next(line for line in output.splitlines() if line.startswith("mapping"))
    mapping = Mapping(**tomllib.loads(line)["mapping"])
    assert [r.prompt for r in map_rows(read_rows(file), mapping)] == ["What is gout?", "Why?"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", str(tmp_path / "none.csv")])
    assert ended.value.code == 2 and "no such file" in capsys.readouterr().err
