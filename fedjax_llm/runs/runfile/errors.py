"""What is wrong with a run file, as one line: the place, the key, the value, and the cure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs.sections import toml_errors

Schema = type[BaseModel]


class Where:
    """Says where a key was set: the `--set` that set it, else file and line, else the file."""

    def __init__(
        self, path: Path, lines: Mapping[toml_errors.Path, int], origin: Mapping[Any, str]
    ) -> None:
        self.path, self.lines, self.origin = path, lines, origin

    def __call__(self, key: toml_errors.Path) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.origin:
                return self.origin[key[:length]]
            if key[:length] in self.lines:
                return f"{self.path}:{self.lines[key[:length]]}"
            # A table that is not in the file was made by the override of a key inside it.
            for overridden, words in self.origin.items():
                if overridden[:length] == key[:length]:
                    return words
        return str(self.path)


def syntax_error(path: Path, source: str, message: str) -> str:
    """What `tomllib` says, with the line in front, where an editor finds it."""
    text, _, position = message.partition(" (at ")
    if position.startswith("line "):
        line = position.removeprefix("line ").split(",")[0]
    else:
        line = str(source.rstrip("\n").count("\n") + 1)
    return f"{path}:{line}: not valid TOML: {text[:1].lower()}{text[1:]}"


def explained(
    error: ValidationError, data: dict[str, Any], where: Where, schema: Schema
) -> UserError | Refused:
    """The first of pydantic's errors, in the order of the file, as one line.

    Args:
      error: from the validation of `data`.
      data: the run file as TOML has it, overrides applied.
      where: says where a key was set.
      schema: the class of a whole run file, which knows the valid keys.
    """
    details = error.errors(include_url=False)
    # What the reader meets first in the file comes first; keys that are missing come after typos,
    # because a typo is usually why a key is missing.
    details.sort(
        key=lambda detail: (
            detail["type"] == "missing",
            where.lines.get(_present(detail["loc"], data), 0),
        )
    )
    first = details[0]
    message = f"{where(_full_path(first, data))}: {_sentence(first, data, schema)}"
    if len(details) > 1:
        message += f" (and {len(details) - 1} more)"
    refused = first["type"] == "run_file" and first["ctx"]["refused"]
    return Refused(message) if refused else UserError(message)


def _full_path(detail: ErrorDetails, data: dict[str, Any]) -> toml_errors.Path:
    if detail["type"] == "run_file":
        return (*detail["loc"], *detail["ctx"]["path"])
    return _present(detail["loc"], data)


def _present(path: toml_errors.Path, data: Any) -> toml_errors.Path:
    """The part of `path` that exists in the data; pydantic appends the names of union members."""
    node = data
    for length, part in enumerate(path):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return path[:length]
    return path


def _sentence(detail: ErrorDetails, data: dict[str, Any], schema: Schema) -> str:
    kind, path = detail["type"], detail["loc"]
    if kind == "extra_forbidden":
        return _unknown_key(path, data, schema)
    if kind == "missing":
        what = "section" if path[-1] in ("model", "clouds", "data") else "key"
        return f"the {what} {toml_errors.key_name(path, data)} is missing"
    if kind == "run_file":
        text = str(detail["ctx"]["text"])
        if not detail["ctx"]["path"]:
            inner = toml_errors.key_name(path, data)
            return text if text.startswith("[") else f"{inner} {text}"
        path = (*path, *detail["ctx"]["path"])
        value = f", got {_value_at(path, data)}" if detail["ctx"]["got"] else ""
        return f"{toml_errors.key_name(path, data)} {text}{value}"
    path = _present(path, data)
    name = toml_errors.key_name(path, data)
    expected = toml_errors.expectation(kind, detail.get("ctx", {}))
    if name == "[training] clients_at_once":
        expected = 'an integer of at least 1 or "auto"'
    guess = None
    if kind == "literal_error" and isinstance(detail["input"], str):
        guess = toml_errors.nearest(
            detail["input"], str(detail["ctx"]["expected"]).split("'")[1::2]
        )
    hint = f"; did you mean {toml_errors.shown(guess)}?" if guess else ""
    got = f"got {toml_errors.shown(detail['input'])}"
    if expected is None:
        return f"{name}: {detail['msg']}, {got}"
    return f"{name} must be {expected}, {got}{hint}"


def _value_at(path: toml_errors.Path, data: Any) -> str:
    node = data
    for part in path:
        if isinstance(node, dict) and part not in node:
            return "the default"
        node = node[part]
    return toml_errors.shown(node)


def _unknown_key(path: toml_errors.Path, data: dict[str, Any], schema: Schema) -> str:
    word = str(path[-1])
    section = _section_at(path[:-1], schema)
    valid = list(section.model_fields) if section else []
    what = "section" if len(path) == 1 and isinstance(data.get(word), dict) else "key"
    name = f"[{word}]" if what == "section" else toml_errors.key_name(path, data)
    guess = toml_errors.nearest(word, valid)
    if guess is None:
        homes = [
            home
            for home, field in schema.model_fields.items()
            if _is_section(field.annotation) and word in field.annotation.model_fields
        ]
        if homes:
            return f"unknown {what} {name}; did you mean [{homes[0]}] {word}?"
        return f"unknown {what} {name}; valid here: {', '.join(valid)}"
    return f"unknown {what} {name}; did you mean {f'[{guess}]' if what == 'section' else guess}?"


def _section_at(path: toml_errors.Path, schema: Schema) -> Schema | None:
    """The class of the table at `path`, through lists and `| None`."""
    section = schema
    for part in path:
        if isinstance(part, int):
            continue
        if part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        inner = [kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)]
        if not inner:
            return None
        section = inner[0]
    return section


def _is_section(annotation: Any) -> TypeGuard[Schema]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
