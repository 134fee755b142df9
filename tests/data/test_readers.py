"""Readers give back what was written, and say which file and line is wrong."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_llm.data import read_rows
from fedjax_llm.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ROWS = st.lists(
    st.fixed_dictionaries({"question": TEXTS, "answer, long": TEXTS}), min_size=1, max_size=6
)
TMP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as info:
        read_rows(path)
    message = str(info.value)
    assert "\n" not in message and str(path) in message
    return message


@TMP
@given(rows=ROWS)
def test_jsonl_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read_rows(tmp_path / "a.jsonl") == rows
    assert read_rows(tmp_path / "a.jsonl.gz") == rows


@TMP
@given(rows=ROWS)
def test_csv_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert read_rows(path) == rows


def test_csv_from_a_spreadsheet_has_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffq,a\r\n1,2\r\n\r\n3,4\r\n".encode())
    assert read_rows(path) == [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]


def test_parquet_round_trip(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": f"question {i}", "label": i, "options": ["a", "b"]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


def test_folder_of_texts_is_one_row_per_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\nline")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not a text")
    assert read_rows(tmp_path) == [
        {"text": "first", "file": "a.txt"},
        {"text": "second\nline", "file": "b.txt"},
    ]
    assert read_rows(tmp_path / "a.txt") == [{"text": "first", "file": "a.txt"}]


GOOD = b'{"q": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.csv", b"q,a\n", "empty"),
        ("a.jsonl", GOOD + b'{"q": }\n', "line 2: not JSON"),
        ("a.jsonl", GOOD * 2 + b"[1]\n", "line 3: a JSON array, not an object"),
        ("a.jsonl", b"null\n", "line 1: a JSON null, not an object"),
        ("a.jsonl", b"7\n", "line 1: a JSON number, not an object"),
        ("a.jsonl", b"[" * 100_000, "line 1: "),
        ("a.jsonl", GOOD + b'{"q": "caf\xe9"}\n', "line 2: not UTF-8 (byte 0xe9 at offset 10"),
        ("a.csv", b"q,a\n1,2\n1\n", "line 3: 1 fields where the header has 2 columns (q, a)"),
        ("a.csv", b"q,a\n1,2,3\n", "line 2: 3 fields"),
        ("a.csv", b"q,q\n1,2\n", "line 1: columns need distinct"),
        ("a.csv", b'q,a\n"1,2\n', "not sound CSV"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-12], "truncated"),
        ("a.jsonl.gz", GOOD, "not a sound gzip file"),
        ("a.parquet", b"PAR1 no parquet", "not a sound parquet file"),
        ("a.xlsx", b"x", "cannot tell the format"),
    ],
)
def test_errors_name_the_file_and_the_line(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in error_of(path)


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "nowhere.jsonl")
    assert "no .txt file" in error_of(tmp_path)


def test_corrupt_gzip_is_told_from_a_sound_one(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(bytes(range(256)) * 50))
    data[40] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(bytes(data))
    assert "gzip" in error_of(tmp_path / "a.txt.gz")


def test_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="jsonl, csv, parquet, text"):
        read_rows(tmp_path / "a.jsonl", "xml")
    with pytest.raises(UserError, match="is a folder"):
        read_rows(tmp_path, "jsonl")
