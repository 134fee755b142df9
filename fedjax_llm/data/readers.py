"""Readers: files of rows as dictionaries, with errors that name the file and the line."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedjax_llm.errors import UserError

Row = dict[str, Any]

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_rows(path: str | Path, format: str | None = None) -> list[Row]:
    """Reads all rows of a file or folder.

    Args:
      path: A `.jsonl`, `.csv` or `.txt` file (each also with `.gz`), a `.parquet` file, or a
        folder of `.txt` files, each of which is one row `{"text": ..., "file": ...}`.
      format: "jsonl", "csv", "parquet" or "text"; None tells it from the name.

    Returns:
      The rows in the order of the file (of the sorted names for a folder), at least one.

    Raises:
      UserError: The file is missing, empty, truncated, not of its format or not UTF-8; the
        message names the file and, where there is one, the line.
    """
    rows = list(iter_rows(path, format))
    if not rows:
        raise UserError(f"{path}: the file is empty; give a file with at least one row")
    return rows


def iter_rows(path: str | Path, format: str | None = None) -> Iterator[Row]:
    """Reads rows one at a time; like `read_rows`, but an empty file yields nothing."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path in the run file")
    name = format or _format_of(path)
    if name not in _READERS:
        raise UserError(f"{path}: unknown format {name!r}; use one of {', '.join(_READERS)}")
    if path.is_dir() and name != "text":
        raise UserError(f"{path}: is a folder, but format {name!r} reads one file; name the file")
    with _file_errors(path):
        yield from _READERS[name](path)


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "text"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise UserError(
            f"{path}: cannot tell the format from the name; use one of {', '.join(_SUFFIXES)} "
            f"(.gz may follow) or set format"
        )
    return _SUFFIXES[suffixes[-1]]


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system or the decompressor reports into one line."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path}: the gzip file is truncated; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a sound gzip file ({error}); copy it again") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason})") from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _lines(path: Path) -> Generator[tuple[int, str]]:
    """Yields (line number from 1, text with its line end)."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                # Spreadsheet programs put a byte-order mark before the first column's name.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset "
                    f"{error.start} of the line); convert the file to UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with closing(_lines(path)) as lines:  # an error would leave the file to the collector
        yield from _objects(path, lines)


def _objects(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); "
                f"each line must be one JSON object"
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep; an integer too long
            raise UserError(f"{path}, line {number}: JSON that cannot be read ({error})") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {_json_kind(row)}, not an object; "
                f'each line must look like {{"column": "value"}}'
            )
        yield row


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {list: "array", str: "string", bool: "boolean"}
    return kinds.get(type(value), "number")


def _read_csv(path: Path) -> Iterator[Row]:
    with closing(_lines(path)) as lines:
        yield from _records(path, csv.reader((line for _, line in lines), strict=True))


def _records(path: Path, reader: Any) -> Iterator[Row]:
    try:
        header = next(reader, None)
        if header is None:
            return
        if "" in header or len(set(header)) != len(header):
            raise UserError(
                f"{path}, line 1: columns need distinct, non-empty names, got {', '.join(header)}"
            )
        for fields in reader:
            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has "
                    f"{len(header)} columns ({', '.join(header)}); quote fields that hold commas"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not sound CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # slow to import and needed by few runs
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a sound parquet file ({reason})") from error


def _read_text(path: Path) -> Iterator[Row]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: the folder holds no .txt file; put one text per file")
    for file in files:
        with _file_errors(file):
            text = "".join(line for _, line in _lines(file))
        if text:
            yield {"text": text, "file": file.name}


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
}
