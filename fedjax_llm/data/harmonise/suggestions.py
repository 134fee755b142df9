"""Suggestions: which column of a cloud's file is the prompt, the answer, and so on.

Each column gets a score for each field, from its name and from what it holds. Names count by a list
of the names that published data sets use; content counts by facts that can be checked: the share of
cells with a question mark, lengths, how many distinct values. Fields then choose, the surest first,
among the columns that are left. Every choice says why, and is a suggestion: nothing is mapped
without the user's word.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedjax_llm.data.harmonise.conversations import conversation_columns, open_conversations
from fedjax_llm.data.readers import Row

FIELDS = ("prompt", "answer", "context", "label", "user", "source")

# In the order of how surely the name says it.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "query", "instruction", "request", "problem", "headline", "input",
        "sentence", "title", "claim", "utterance", "tweet", "post", "review", "text",
    ),
    "answer": (
        "answer", "response", "output", "completion", "reply", "target", "solution", "chosen",
        "summary", "long_answer", "explanation", "generation", "text", "content", "body",
    ),
    "context": (
        "context", "passage", "background", "document", "article", "abstract", "paragraph",
        "evidence", "input", "story", "history",
    ),
    "label": (
        "label", "sentiment", "class", "category", "rating", "intent", "topic", "answerkey",
        "gold", "stance", "emotion", "polarity",
    ),
    "user": (
        "user", "user_id", "userid", "author", "speaker", "client", "patient", "patient_id",
        "customer", "account", "writer", "annotator",
    ),
    "source": (
        "source", "dataset", "origin", "corpus", "site", "domain", "url", "publisher", "file",
        "filename",
    ),
}  # fmt: skip
_CERTAIN = 0.9
_LEAST = 0.3
_NEVER = {"split", "fold", "id", "idx", "index", "row"}
_LONG = 40  # characters; labels and names are shorter
_FEW = 50


@dataclass(frozen=True)
class ColumnFacts:
    """What a column holds.

    Attributes:
      name: The column.
      filled: Share of rows with something in it, in [0, 1].
      length: Median characters of the filled cells.
      distinct: Distinct values.
      questions: Share of the filled cells that hold a question mark.
      textual: Whether most filled cells are texts and not numbers or identifiers.
      prose: Share of the filled cells of at least three words.
    """

    name: str
    filled: float
    length: float
    distinct: int
    questions: float
    textual: bool
    prose: float


@dataclass(frozen=True)
class Choice:
    """One field of a suggested mapping.

    Attributes:
      field: "prompt", "answer", "context", "label", "user" or "source".
      column: The column.
      confidence: In (0, 1]; a judgement, not a probability.
      reason: Why, in words.
    """

    field: str
    column: str
    confidence: float
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """A mapping to start from.

    Attributes:
      choices: The fields for which a column was found, in the order of `FIELDS`.
    """

    choices: tuple[Choice, ...]

    @property
    def complete(self) -> bool:
        """Whether a run file would take it: there is an answer."""
        return any(choice.field == "answer" for choice in self.choices)

    def toml(self) -> str:
        """The line for a run file.

        >>> Suggestion((Choice("answer", "text", 0.9, ""),)).toml()
        'mapping = { answer = "text" }'
        """
        pairs = ", ".join(f"{c.field} = {_quoted(c.column)}" for c in self.choices)
        return f"mapping = {{ {pairs} }}"


def column_facts(rows: Sequence[Row], name: str) -> ColumnFacts:
    """The facts about one column of at least one row."""
    cells = [row.get(name) for row in rows]
    texts = [text for cell in cells if (text := _shown(cell).strip())]
    count = max(len(texts), 1)
    words = sum(not re.fullmatch(r"[\d\W_]*|\S*\d\S*", text) for text in texts)
    return ColumnFacts(
        name=name,
        filled=len(texts) / len(rows),
        length=statistics.median(map(len, texts)) if texts else 0.0,
        distinct=len(set(texts)),
        questions=sum("?" in text for text in texts) / count,
        textual=words > count / 2,
        prose=sum(len(text.split()) >= 3 for text in texts) / count,
    )


def suggest_mapping(rows: Sequence[Row]) -> Suggestion:
    """Suggests which columns are which fields.

    Args:
      rows: At least one row of one source; columns that hold conversations are opened.

    Returns:
      For each field the column that suits it best, each column for one field at most; fields that
      no column suits are left out.
    """
    chats = conversation_columns(rows)
    if chats:
        column = chats[0]
        opened = open_conversations(rows)
        choices = []
        for field in ("prompt", "answer", "context"):
            if any(row[f"{column}.{field}"] for row in opened):
                why = f"{column} holds chat messages; its last {field} was taken"
                choices.append(Choice(field, f"{column}.{field}", _CERTAIN, why))
        facts = _facts(rows, skip=_NEVER | set(chats))
        return Suggestion((*choices, *_assign(facts, ("label", "user", "source"), len(rows))))
    facts = _facts(rows, skip=_NEVER)
    choices = _assign(facts, FIELDS, len(rows))
    taken = {choice.field: choice for choice in choices}
    if "answer" not in taken and "label" in taken:
        # A classification file: what the model should say is the class.
        label = taken["label"]
        why = f"nothing else can be said; {label.column} is the class"
        choices.append(Choice("answer", label.column, label.confidence, why))
    elif "answer" not in taken and "prompt" in taken:
        text = taken["prompt"]
        choices.remove(text)
        choices.append(Choice("answer", text.column, text.confidence, "plain text, learnt whole"))
    return Suggestion(tuple(sorted(choices, key=lambda choice: FIELDS.index(choice.field))))


def _facts(rows: Sequence[Row], skip: set[str]) -> list[ColumnFacts]:
    names = dict.fromkeys(name for row in rows for name in row)
    found = [column_facts(rows, name) for name in names if name not in skip]
    return [facts for facts in found if facts.filled > 0]


def _assign(facts: Sequence[ColumnFacts], fields: Sequence[str], rows: int) -> list[Choice]:
    scored = [
        Choice(field, column.name, score, reason)
        for field in fields
        for column in facts
        for score, reason in [_score(field, column, rows)]
        if score >= _LEAST
    ]
    # Ties fall to the earlier field and column, so that the same file gives the same mapping.
    scored.sort(key=lambda choice: -choice.confidence)
    chosen: dict[str, Choice] = {}
    columns: set[str] = set()
    for choice in scored:
        if choice.field not in chosen and choice.column not in columns:
            chosen[choice.field] = choice
            columns.add(choice.column)
    return list(chosen.values())


def _score(field: str, column: ColumnFacts, rows: int) -> tuple[float, str]:
    """How well a column suits a field, in [0, 1], and why."""
    by_name, named = _by_name(field, column.name)
    by_content, held = _by_content(field, column, rows)
    if by_content < 0 and not (field == "context" and named):
        return 0.0, held  # the content says no, whatever the name is
    if by_content < 0:  # an input may be as short as one word
        by_content, held = 0.0, ""
    # Half from each; a telling name alone is enough, telling content alone is a guess.
    score = min(1.0, 0.65 * by_name + 0.35 * by_content)
    return round(score, 2), ", ".join(part for part in (named, held) if part)


def _by_name(field: str, name: str) -> tuple[float, str]:
    plain = re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")
    names = _NAMES[field]
    for rank, known in enumerate(names):
        if plain in (known, known.replace("_", "")):
            return 1.0 - 0.5 * rank / len(names), f"named {name}"
    parts = set(plain.split("_"))
    for rank, known in enumerate(names):
        if known in parts:
            return 0.75 - 0.5 * rank / len(names), f"{name} contains {known}"
    return 0.0, ""


def _by_content(field: str, column: ColumnFacts, rows: int) -> tuple[float, str]:
    """A judgement of the content in [0, 1], or -1 where it speaks against the field."""
    few = 2 <= column.distinct <= min(_FEW, max(2, rows // 2)) and column.length <= _LONG
    if field == "prompt":
        if not column.textual or column.prose < 0.2:
            return -1.0, "holds no sentences"
        asked = f"{column.questions:.0%} hold a question mark"
        return 0.5 + 0.5 * column.questions, asked if column.questions > 0.2 else ""
    if field == "answer":
        return (0.7 if column.length >= _LONG else 0.4), f"median {column.length:.0f} characters"
    if field == "context":
        if not column.textual or column.length < _LONG:
            return -1.0, "too short for a passage"
        return min(1.0, column.length / 400), f"median {column.length:.0f} characters"
    if field == "label":
        return (0.9, f"{column.distinct} distinct values") if few else (-1.0, "no classes")
    repeated = 1 < column.distinct < rows * column.filled and column.length <= 2 * _LONG
    if field == "user":
        return (0.5, f"{column.distinct} distinct values") if repeated else (-1.0, "not repeated")
    return (0.5, f"{column.distinct} distinct values") if column.length <= 2 * _LONG else (-1.0, "")


def _shown(cell: Any) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else str(cell)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
