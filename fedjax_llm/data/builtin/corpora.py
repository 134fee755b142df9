"""The embedded corpora: rows made from the fact tables beside this module, without any download.

| name | columns | one row teaches |
|---|---|---|
| medical | question, response, topic | a general fact about a condition, in a fixed wording |
| finance | headline, sentiment (0, 1, 2), ticker, reason | the sentiment of a headline and why |
| general | instruction, input, output, category | a small task with one right answer |

Answers are short and worded alike within a cloud, so that a small model measurably learns from few
noisy steps. The medical facts are general knowledge, the companies are invented.
"""

import functools
import importlib.resources
import tomllib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from fedjax_llm.data.mapping import Mapping
from fedjax_llm.data.readers import Row
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError

_MAPPINGS = {
    "medical": Mapping(prompt="question", answer="response", group="topic"),
    "finance": Mapping(
        prompt="Headline: {headline}",
        answer="Sentiment: {sentiment}, because of {reason}.",
        label="sentiment",
        group="{ticker} {reason}",
        values={"sentiment": {0: "negative", 1: "neutral", 2: "positive"}},
    ),
    "general": Mapping(
        prompt="{instruction}\n{input}",
        answer="output",
        label="category",
        group="{category} {input}",
    ),
}
BUILTIN_NAMES = tuple(_MAPPINGS)


def builtin_rows(name: str, count: int, seed: int) -> list[Row]:
    """Draws distinct rows of an embedded corpus.

    Args:
      name: "medical", "finance" or "general".
      count: How many rows, from 1 to `builtin_capacity(name)`.
      seed: Chooses the rows and their order; the same seed gives the same rows everywhere, and
        fewer rows are the beginning of more rows.

    Raises:
      UserError: Unknown name, or a count that the corpus cannot give without repeating itself.
    """
    rows = _all_rows(_checked(name))
    if not 1 <= count <= len(rows):
        raise UserError(f"builtin:{name} has 1 to {len(rows)} rows, got {count}; set limit in it")
    order = sorted(range(len(rows)), key=lambda index: keyed_hash(f"{name} {index}", seed))
    return [dict(rows[index]) for index in order[:count]]


def builtin_mapping(name: str) -> Mapping:
    """The mapping that fits `builtin_rows(name, ...)`."""
    return _MAPPINGS[_checked(name)]


def builtin_capacity(name: str) -> int:
    """How many distinct rows the corpus has."""
    return len(_all_rows(_checked(name)))


def _checked(name: str) -> str:
    if name not in _MAPPINGS:
        raise UserError(f"no embedded corpus {name!r}; use one of {', '.join(BUILTIN_NAMES)}")
    return name


@functools.cache
def _all_rows(name: str) -> tuple[Row, ...]:
    resource = importlib.resources.files(__package__) / f"{name}.toml"
    return tuple(_MAKERS[name](tomllib.loads(resource.read_text("utf-8"))))


def _medical(tables: dict[str, Any]) -> Iterator[Row]:
    for (name, facts), (attribute, title) in product(
        tables["condition"].items(), tables["attributes"].items()
    ):
        for question in tables["questions"][attribute]:
            yield {
                "question": question.format(name=name),
                "response": f"{title}: {facts[attribute]}.",
                "topic": f"{name}, {attribute}",
            }


def _finance(tables: dict[str, Any]) -> Iterator[Row]:
    for event, (ticker, company), amount in product(
        tables["event"], tables["companies"].items(), tables["amounts"]
    ):
        yield {
            "headline": event["headline"].format(company=company, amount=amount),
            "sentiment": event["sentiment"],
            "ticker": ticker,
            "reason": event["reason"],
        }


def _general(tables: dict[str, Any]) -> Iterator[Row]:
    for category, instructions in tables["instructions"].items():
        for (given, output), instruction in product(_tasks(category, tables), instructions):
            yield {
                "instruction": instruction,
                "input": given,
                "output": f"Answer: {output}.",
                "category": category,
            }


def _tasks(category: str, tables: dict[str, Any]) -> list[tuple[str, str]]:
    """The (input, output) pairs of a category."""
    if category == "conversion":
        units, amounts = tables["conversion"]["units"], tables["conversion"]["amounts"]
        return [
            (f"{amount} {one} to {two}", f"{amount * factor} {two}")
            for (one, two, factor), amount in product(units, amounts)
        ]
    if category in ("sum", "difference"):
        pairs = product(tables["arithmetic"]["first"], tables["arithmetic"]["second"])
        if category == "sum":
            return [(f"{a} + {b}", str(a + b)) for a, b in pairs]
        return [(f"{a} - {b}", str(a - b)) for a, b in pairs]
    return list(tables[category].items())


_MAKERS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "medical": _medical,
    "finance": _finance,
    "general": _general,
}
