"""Inspection: what a file holds, before anyone trains on it, and a mapping to start from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedjax_llm.data.harmonise.conversations import open_conversations
from fedjax_llm.data.harmonise.duplicates import Likeness, find_duplicates
from fedjax_llm.data.harmonise.languages import UNDETERMINED, languages_of
from fedjax_llm.data.harmonise.suggestions import Suggestion, suggest_mapping
from fedjax_llm.data.mapping import Mapping, MappingReport, map_rows_counted
from fedjax_llm.data.readers import Row
from fedjax_llm.data.records import Record

# Telling languages and near duplicates takes about a millisecond a row.
SAMPLE = 5000
_SHOWN = 8


@dataclass(frozen=True)
class Inspection:
    """What a source holds.

    Attributes:
      name: The source.
      columns: Its columns, those of opened conversations included.
      rows: Rows of it.
      suggestion: Which columns are which fields.
      mapping: What the suggested mapping makes of the rows; None if there is no answer.
      sampled: How many of the records were looked at for what follows.
      exact_duplicates: Records with the same text as another.
      near_duplicates: Records that are near duplicates of another, exact ones not counted.
      languages: Records in each language, "und" where it cannot be told.
      labels: Records with each label.
      lengths: Smallest, median and largest characters of prompt, answer and context.
    """

    name: str
    columns: tuple[str, ...]
    rows: int
    suggestion: Suggestion
    mapping: MappingReport | None
    sampled: int
    exact_duplicates: int
    near_duplicates: int
    languages: Counter[str]
    labels: Counter[str]
    lengths: dict[str, tuple[int, int, int]]

    def lines(self) -> list[str]:
        """The inspection as lines for the user; the mapping first."""
        found = [f"{self.name}: {self.rows} rows, columns {', '.join(self.columns)}"]
        if self.mapping is None:
            return [*found, "  no column looks like an answer; write the mapping by hand"]
        found += [self.suggestion.toml()]
        found += [
            f"  {c.field:<8} {c.column} ({c.confidence:.2f}): {c.reason}"
            for c in self.suggestion.choices
        ]
        counts = {
            "empty answers": self.mapping.empty_answers,
            "empty prompts": self.mapping.empty_prompts,
            "exact duplicates": self.exact_duplicates,
            "near duplicates": self.near_duplicates,
        }
        of = "" if self.sampled == self.mapping.records else f" (of the first {self.sampled} rows)"
        found.append("  " + ", ".join(f"{n} {what}" for what, n in counts.items()) + of)
        found += [
            f"  {part}: {low} to {high} characters, median {median}"
            for part, (low, median, high) in self.lengths.items()
        ]
        if self.languages:
            found.append(f"  languages: {_top(self.languages)}")
        if self.labels:
            found.append(f"  labels: {_top(self.labels)}")
        return found


def inspect_rows(name: str, rows: Sequence[Row], sample: int = SAMPLE) -> Inspection:
    """Looks at the rows of one source.

    Args:
      name: What to call the source.
      rows: Its rows, at least one.
      sample: Records to look at for duplicates, languages, labels and lengths, from the first on.

    Raises:
      UserError: A cell that is no text.
    """
    opened = open_conversations(rows)
    suggestion = suggest_mapping(rows)
    records: list[Record] = []
    report = None
    if suggestion.complete:
        columns: dict[str, Any] = {c.field: c.column for c in suggestion.choices}
        mapping = Mapping(**columns)
        records, report = map_rows_counted(opened, mapping)
    looked = records[:sample]
    found = find_duplicates(looked, Likeness("near"))
    gone = found.of_N >= 0
    return Inspection(
        name=name,
        columns=tuple(dict.fromkeys(column for row in opened for column in row)),
        rows=len(rows),
        suggestion=suggestion,
        mapping=report,
        sampled=len(looked),
        exact_duplicates=int((gone & found.exact_N).sum()),
        near_duplicates=int((gone & ~found.exact_N).sum()),
        languages=languages_of(looked),
        labels=Counter(record.label for record in looked if record.label),
        lengths={
            part: _spread([len(getattr(record, part)) for record in looked])
            for part in ("prompt", "answer", "context")
            if any(getattr(record, part) for record in looked)
        },
    )


def _spread(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _top(counts: Counter[str]) -> str:
    shown = [
        f"{'cannot be told' if name == UNDETERMINED else name[:40]} {n}"
        for name, n in counts.most_common(_SHOWN)
    ]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(_SHOWN))
    return ", ".join([*shown, f"others {rest}"] if rest else shown)
