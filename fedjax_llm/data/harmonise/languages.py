"""Languages: which language a row is written in, and keeping the rows of some languages.

The language is told by py3langid, a naive Bayes classifier over byte n-grams for 139 languages
(Lui and Baldwin 2012, "langid.py", section 2) whose model comes with the package, is read without
pickle, and gives the same answer on every machine. Short texts say little: below
`MIN_CONFIDENCE` a text counts as undetermined and is kept, because a wrong drop costs data and a
wrong keep costs little.
"""

import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError

# Of the classifier's own probability, which its authors calibrate over lengths.
MIN_CONFIDENCE = 0.5
UNDETERMINED = "und"
_NO_LANGUAGE = "zxx"  # numbers, markup, identifiers


def language_of(text: str) -> str:
    """The ISO 639 code of a text's language, or "und" where it cannot be told.

    Example:
      >>> language_of("Was sind die Symptome von Asthma?"), language_of("12 + 4")
      ('de', 'und')
    """
    code, confidence = _classifier().classify(text)
    if code == _NO_LANGUAGE or confidence < MIN_CONFIDENCE:
        return UNDETERMINED
    return str(code)


def languages_of(records: Sequence[Record]) -> Counter[str]:
    """How many records are in each language; "und" counts those that cannot be told."""
    return Counter(_language(record) for record in records)


def filter_languages(
    records: Sequence[Record], languages: Sequence[str]
) -> tuple[list[Record], Step]:
    """Keeps the records in some languages, and those whose language cannot be told.

    Whether a row stays depends on that row alone.

    Args:
      records: N records of one cloud.
      languages: ISO 639 codes, as "en" or "de"; at least one.

    Returns:
      The records that stay in their order, and how many were dropped of each language.

    Raises:
      UserError: No language, or one that the classifier does not know.
    """
    _check(languages)
    wanted = {*languages, UNDETERMINED}
    found = [_language(record) for record in records]
    dropped = Counter(f"in language {code}" for code in found if code not in wanted)
    kept = [record for record, code in zip(records, found, strict=True) if code in wanted]
    unsure = found.count(UNDETERMINED)
    note = f"{unsure} rows kept whose language cannot be told" if unsure else ""
    return kept, Step("language", len(records), counted(dict(dropped.most_common())), note=note)


def _language(record: Record) -> str:
    parts = (record.context, record.prompt, record.answer)
    return language_of("\n".join(part for part in parts if part))


def _check(languages: Sequence[str]) -> None:
    if not languages:
        raise UserError('languages is empty, which drops every row; name some, as ["en", "de"]')
    known = [code for code in _classifier().labels if code != _NO_LANGUAGE]
    for code in languages:
        if code not in known:
            near = difflib.get_close_matches(code.casefold()[:3], known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"no language {code!r}; {hint}use ISO 639 codes, as 'en', 'de', 'zh' "
                f"({len(known)} are known)"
            )


@functools.cache
def _classifier() -> Any:
    # Imported late: it unpacks its model, about a second, which most runs need not wait for.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
