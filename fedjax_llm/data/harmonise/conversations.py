"""Conversations: rows that hold a list of chat messages get columns that a mapping can name.

Chat data sets keep a whole conversation in one cell, as `messages` with `role` and `content` or
`conversations` with `from` and `value`. Beside such a column C these are added, as texts:

| column | holds |
|---|---|
| `C.answer` | the last message of the assistant |
| `C.prompt` | the last message of the user before it |
| `C.context` | the messages before that, `role: content`, one after the other |
| `C.system` | the system message |

A row whose conversation has no such message has the empty text there. Other rows stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.data.readers import Row

_ROLES = {
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "user": "user",
    "human": "user",
    "system": "system",
}
_PARTS = ("prompt", "answer", "context", "system")


def is_conversation(value: Any) -> bool:
    """Whether a cell is a non-empty list of messages with a known role and a text.

    >>> is_conversation([{"role": "user", "content": "Hi"}]), is_conversation(["a", "b"])
    (True, False)
    """
    return isinstance(value, list) and bool(value) and all(_message(item) for item in value)


def conversation_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that hold a conversation in every row where they hold anything."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = []
    for name in names:
        cells = [row[name] for row in rows if row.get(name)]
        if cells and all(map(is_conversation, cells)):
            found.append(name)
    return found


def open_conversations(rows: Sequence[Row]) -> list[Row]:
    """The rows with the columns of this module's table added; a column that is there stays."""
    columns = conversation_columns(rows)
    if not columns:
        return list(rows)
    return [
        {
            f"{column}.{part}": text
            for column in columns
            for part, text in _parts(row.get(column) or []).items()
        }
        | row
        for row in rows
    ]


def _message(item: Any) -> tuple[str, str] | None:
    """(role, text) of a message in either form."""
    if not isinstance(item, Mapping):
        return None
    for role_key, text_key in (("role", "content"), ("from", "value")):
        role, text = item.get(role_key), item.get(text_key)
        if isinstance(role, str) and isinstance(text, str) and role.casefold() in _ROLES:
            return _ROLES[role.casefold()], text
    return None


def _parts(messages: Sequence[Any]) -> dict[str, str]:
    turns = [turn for item in messages if (turn := _message(item)) is not None]
    found = dict.fromkeys(_PARTS, "")
    found["system"] = next((text for role, text in turns if role == "system"), "")
    talk = [turn for turn in turns if turn[0] != "system"]
    last = _last(talk, "assistant", len(talk))
    if last is None:
        return found
    found["answer"] = talk[last][1]
    asked = _last(talk, "user", last)
    if asked is not None:
        found["prompt"] = talk[asked][1]
        found["context"] = "\n".join(f"{role}: {text}" for role, text in talk[:asked])
    return found


def _last(turns: Sequence[tuple[str, str]], role: str, stop: int) -> int | None:
    return next((i for i in range(stop - 1, -1, -1) if turns[i][0] == role), None)
