"""Mapping: from a cloud's own column names to the common record."""

import difflib
import string
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Any

from fedjax_llm.data.records import Record, normalise_text
from fedjax_llm.errors import UserError

FIELDS = ("prompt", "answer", "context", "label", "group", "user", "source")


@dataclass(frozen=True)
class Mapping:
    r"""Where each field of `Record` comes from in a cloud's rows.

    Each field is the name of a column, or a template such as ``"Q: {question}\n{options}"`` with
    column names in braces (`{{` and `}}` stand for braces), or empty when the cloud has none.
    Lists become one line per item, dictionaries one line `key. value` per item, null is empty.

    Attributes:
      answer: Column or template of what the model should say.
      prompt: Column or template of the question; empty for plain text, whose column is `answer`.
      context: Column or template of a passage shown before the prompt.
      label: Column or template of the class.
      group: Column or template of what must stay on one side of the split.
      user: Column or template that tells whose row it is.
      source: Column or template that tells where a row came from; empty takes the file's name.
      values: For each column, what its values stand for: `{"sentiment": {0: "negative"}}`.
        Keys are compared as text, so that 0 and "0" are the same; applied before templates.
    """

    answer: str
    prompt: str = ""
    context: str = ""
    label: str = ""
    group: str = ""
    user: str = ""
    source: str = ""
    values: MappingABC[str, MappingABC[Any, str]] = field(default_factory=dict)

    def columns(self) -> tuple[str, ...]:
        """The columns that the mapping reads, in order of first use.

        Raises:
          UserError: A template is malformed, or `answer` is empty.
        """
        if not self.answer:
            raise UserError("mapping: answer is empty; name the column that the model should learn")
        names: dict[str, None] = {}
        for name in FIELDS:
            for _, column in _parse(getattr(self, name), name):
                if column:
                    names[column] = None
        return tuple(names)


@dataclass(frozen=True)
class MappingReport:
    """What became of the rows.

    Attributes:
      rows: Rows read.
      records: Records made; `rows` less the two kinds of dropped rows.
      empty_answers: Rows dropped because their answer is empty.
      empty_prompts: Rows dropped because the mapping names a prompt and it is empty, context too.
      missing: For each column, the rows that lack it and were given the empty text.
    """

    rows: int
    records: int
    empty_answers: int = 0
    empty_prompts: int = 0
    missing: MappingABC[str, int] = field(default_factory=dict)


def map_rows(rows: Sequence[MappingABC[str, Any]], mapping: Mapping) -> list[Record]:
    """Maps rows to records; `map_rows_counted` also returns what was dropped."""
    return map_rows_counted(rows, mapping)[0]


def map_rows_counted(
    rows: Sequence[MappingABC[str, Any]], mapping: Mapping
) -> tuple[list[Record], MappingReport]:
    """Maps rows to records and counts what was dropped.

    Args:
      rows: Rows of one source; JSON Lines may leave a column out of some rows.
      mapping: Where the fields come from.

    Returns:
      The records in row order, and the counts.

    Raises:
      UserError: A column is in none of the rows, a template is malformed, or a column of
        `mapping.values` holds a value that it does not translate.
    """
    columns = mapping.columns()
    _check_columns(rows, [*columns, *mapping.values])
    templates = {name: _parse(getattr(mapping, name), name) for name in FIELDS}
    values = {
        column: {_text(key): text for key, text in table.items()}
        for column, table in mapping.values.items()
    }
    records = []
    empty_answers = empty_prompts = 0
    missing = dict.fromkeys(columns, 0)
    for number, row in enumerate(rows, start=1):
        cells = {}
        for column in columns:
            missing[column] += column not in row
            cells[column] = _cell(row.get(column), column, values.get(column), number)
        texts = {name: _fill(template, cells) for name, template in templates.items()}
        if not texts["answer"]:
            empty_answers += 1
        elif mapping.prompt and not (texts["prompt"] or texts["context"]):
            empty_prompts += 1
        else:
            records.append(Record(**texts))
    report = MappingReport(
        rows=len(rows),
        records=len(records),
        empty_answers=empty_answers,
        empty_prompts=empty_prompts,
        missing={column: count for column, count in missing.items() if count},
    )
    return records, report


def _parse(template: str, field_name: str) -> list[tuple[str, str]]:
    """Splits a template into (literal text, column or "") pairs; a bare name is one column."""
    if "{" not in template and "}" not in template:
        return [("", template)] if template else []
    pieces = []
    try:
        for literal, column, spec, conversion in string.Formatter().parse(template):
            if column is not None and (not column.strip() or spec or conversion):
                raise ValueError("only {column} may stand in braces")
            pieces.append((literal, column or ""))
    except ValueError as error:
        raise UserError(
            f"mapping: {field_name} = {template!r} is not a template ({error}); "
            f"write columns as {{column}} and braces as {{{{ and }}}}"
        ) from error
    return pieces


def _fill(template: list[tuple[str, str]], cells: dict[str, str]) -> str:
    # A template whose columns are all empty is empty: a lone "Q:" is not a question.
    if any(column for _, column in template) and not any(
        cells[column].strip() for _, column in template if column
    ):
        return ""
    return normalise_text("".join(text + (cells[col] if col else "") for text, col in template))


def _check_columns(rows: Sequence[MappingABC[str, Any]], wanted: Iterable[str]) -> None:
    if not rows:
        return
    known: dict[str, None] = {}
    for row in rows:
        known.update(dict.fromkeys(row))
    for column in wanted:
        if column not in known:
            folded = {name.casefold(): name for name in known}
            near = difflib.get_close_matches(column.casefold(), list(folded), n=1, cutoff=0.5)
            hint = (
                f"did you mean {folded[near[0]]!r}?" if near else "name one of these in the mapping"
            )
            raise UserError(
                f"mapping: no column {column!r}; the rows have {', '.join(known)}; {hint}"
            )


def _cell(value: Any, column: str, table: dict[str, str] | None, number: int) -> str:
    text = _text(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"row {number}: column {column!r} holds half a surrogate pair, which is not text; "
            f"repair the row"
        ) from error
    if table is None or value is None:
        return text
    if text not in table:
        raise UserError(
            f"mapping: row {number} has {column} = {text[:40]!r}, which values.{column} does not "
            f"translate; it knows {', '.join(table)}"
        )
    return table[text]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "\n".join(_text(item) for item in value)
    if isinstance(value, dict):
        return "\n".join(f"{key}. {_text(item)}" for key, item in value.items())
    return str(value)
