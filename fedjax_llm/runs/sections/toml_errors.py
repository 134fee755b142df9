"""Where in a TOML source each key stands, and one-line wording for what is wrong with a run file.

`tomllib` gives values without positions, so a small scanner walks the same source again. It is only
ever used on a source that `tomllib` has accepted, which is why it checks nothing itself.
"""

import difflib
import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # multi-line basic; up to two quotes may precede the closing three
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def key_lines(source: str) -> dict[Path, int]:
    """The line (from 1) on which each key, table and array element of a valid TOML source begins.

    >>> key_lines("rounds = 3\\n[[clouds]]\\nlink = {latency_ms = 5}\\n")["clouds", 0, "link"]
    3
    """
    scanner = _Scanner(source)
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, source: str) -> None:
        self.source = source
        self.position = 0
        self.lines: dict[Path, int] = {}
        self.elements: dict[Path, int] = {}  # arrays of tables: how many elements so far
        self.starts = [0] + [match.end() for match in re.finditer("\n", source)]

    def document(self) -> None:
        prefix: Path = ()
        while self._blank() < len(self.source):
            start = self.position
            if self.source.startswith("[[", start):
                self.position += 2
                *outer, last = self._key()
                array = (*self._resolve(outer), last)
                self.elements[array] = self.elements.get(array, 0) + 1
                self.lines.setdefault(array, self._line(start))
                prefix = (*array, self.elements[array] - 1)
                self.lines[prefix] = self._line(start)
                self.position = self.source.index("]]", self.position) + 2
            elif self.source[start] == "[":
                self.position += 1
                *outer, last = self._key()
                prefix = (*self._resolve(outer), last)
                self._note(prefix, start)
                self.position = self.source.index("]", self.position) + 1
            else:
                self._pair(prefix)

    def _pair(self, prefix: Path) -> None:
        start = self.position
        path = prefix
        for part in self._key():
            path = (*path, part)
            self._note(path, start)
        self.position = self.source.index("=", self.position) + 1
        self._value(path)

    def _value(self, path: Path) -> None:
        start = self._blank()
        if self.source[start] == "{":
            self.position += 1
            while self.source[self._separators()] != "}":
                self._pair(path)
            self.position += 1
        elif self.source[start] == "[":
            self.position += 1
            index = 0
            while self.source[self._separators()] != "]":
                self._note((*path, index), self.position)
                self._value((*path, index))
                index += 1
            self.position += 1
        else:
            match = _STRING.match(self.source, start) or _SCALAR.match(self.source, start)
            self.position = match.end() if match else len(self.source)

    def _key(self) -> list[str]:
        parts = []
        while True:
            start = self._blank()
            if self.source[start] in "\"'":
                match = _STRING.match(self.source, start)
                text = match.group() if match else ""
                parts.append(tomllib.loads(f"key = {text}")["key"])
            else:
                match = _BARE_KEY.match(self.source, start)
                parts.append(match.group() if match else "")
            self.position = match.end() if match else len(self.source)
            if self.source[self._blank() : self.position + 1] != ".":
                return parts
            self.position += 1

    def _resolve(self, parts: Iterable[str]) -> Path:
        """A header names the last element of every array of tables it passes through."""
        path: Path = ()
        for part in parts:
            path = (*path, part)
            self._note(path, self.position)
            if path in self.elements:
                path = (*path, self.elements[path] - 1)
        return path

    def _blank(self) -> int:
        match = _BLANK.match(self.source, self.position)
        self.position = match.end() if match else self.position
        return self.position

    def _separators(self) -> int:
        while self.source[self._blank()] == ",":
            self.position += 1
        return self.position

    def _note(self, path: Path, start: int) -> None:
        self.lines.setdefault(path, self._line(start))

    def _line(self, position: int) -> int:
        return bisect_right(self.starts, position)


def key_name(path: Sequence[str | int], data: Mapping[str, Any]) -> str:
    """A key as a reader finds it: `[training] learning_rate`, `[clouds.medical] link.up_mbps`.

    >>> key_name(("clouds", 0, "link"), {"clouds": [{"name": "medical"}]})
    '[clouds.medical] link'
    """
    parts = [str(part) for part in path]
    if len(path) > 1 and path[0] == "clouds" and isinstance(path[1], int):
        section, rest = f"[clouds.{_cloud_name(path[1], data)}]", parts[2:]
    elif len(path) > 1 or isinstance(data.get(parts[0]), dict):
        section, rest = f"[{parts[0]}]", parts[1:]
    else:
        section, rest = "", parts
    return " ".join(piece for piece in (section, ".".join(rest)) if piece)


def _cloud_name(index: int, data: Mapping[str, Any]) -> str:
    clouds = data.get("clouds")
    if isinstance(clouds, list) and index < len(clouds) and isinstance(clouds[index], dict):
        return str(clouds[index].get("name", index))
    return str(index)


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word that `word` most likely meant, or None when none is close."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return close[0] if close else None


def shown(value: object, limit: int = 60) -> str:
    """A value as TOML writes it, shortened to `limit` characters."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "a table"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def expectation(kind: str, context: Mapping[str, Any]) -> str | None:
    """What a pydantic error of type `kind` says a value has to be, completing `KEY must be ...`."""
    bounds = {
        "greater_than": ("greater than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"{words} {context[key]:g}"
    if kind == "literal_error":
        return "one of " + str(context["expected"]).replace("'", '"').replace(" or ", ", ")
    if kind == "string_pattern_mismatch":
        return f"letters, digits, dots, dashes and underscores ({context['pattern']})"
    return {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": 'a string in quotes, as "this"',
        "string_too_short": "a text that is not empty",
        "bool_type": "true or false",
        "tuple_type": 'a list, as ["this"]',
        "list_type": 'a list, as ["this"]',
        "dict_type": "a table of keys and values",
        "too_short": "a list with at least one element",
        "model_type": "a table of keys and values",
        "model_attributes_type": "a table of keys and values",
    }.get(kind)
