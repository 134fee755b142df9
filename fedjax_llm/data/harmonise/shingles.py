"""Shingles: a text as the set of its short pieces, by which likeness is measured.

Two texts are as alike as their sets of k-shingles: J(A, B) = |A ∩ B| / |A ∪ B| (Broder 1997, "On
the resemblance and containment of documents", section 2; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.2). The pieces are characters, not words, so that scripts without
spaces work too; k = 5, which that section gives for short documents.

Letters: N texts, S shingles of all texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from fedjax_llm.data.records import Record

Compare = Literal["record", "prompt"]

WIDTH = 5
# A file's name is not part of what its rows say.
_FIELDS = tuple(field.name for field in fields(Record) if field.compare)
# Between the fields of a record, so that moving a word across changes the text; no cleaned text
# holds it.
_BETWEEN = "\x1f"


@dataclass(frozen=True)
class Shingles:
    """The sets of N texts, one after the other.

    Attributes:
      hashes_S: 64-bit hashes of the shingles, uint64, ascending and distinct within each text.
      offsets: N + 1 positions, int64: text i has `hashes_S[offsets[i]:offsets[i + 1]]`, which is
        never empty.
    """

    hashes_S: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.offsets) - 1

    def of(self, text: int) -> np.ndarray:
        """The set of one text."""
        return self.hashes_S[self.offsets[text] : self.offsets[text + 1]]

    def jaccard(self, one: int, two: int) -> float:
        """The exact Jaccard similarity of two texts, in [0, 1]."""
        a, b = self.of(one), self.of(two)
        both = len(np.intersect1d(a, b, assume_unique=True))
        return both / (len(a) + len(b) - both)


def fold_text(text: str) -> str:
    r"""A text as it is compared: case and spacing do not make two texts different.

    >>> fold_text(" What  is\tAsthma?\n")
    'what is asthma?'
    """
    return " ".join(text.casefold().split())


def exact_text(record: Record, compare: Compare) -> str:
    """What of a record has to be equal in exact duplicates.

    Args:
      record: The record.
      compare: "record" takes prompt, context and answer; "prompt" leaves out the answer, so that
        one question with two answers is a duplicate. A record of answer alone is compared by it.
    """
    fields = [record.prompt, record.context]
    if compare == "record" or not any(fields):
        fields.append(record.answer)
    return _BETWEEN.join(fields)


def compared_text(record: Record, compare: Compare) -> str:
    """The same, folded, by which likeness is measured."""
    return _BETWEEN.join(map(fold_text, exact_text(record, compare).split(_BETWEEN)))


def content_of(record: Record) -> str:
    """All that a record says, as one text."""
    return "\0".join(getattr(record, name) for name in _FIELDS)


def shingle(texts: Sequence[str], width: int = WIDTH) -> Shingles:
    """The sets of shingles of texts.

    A text shorter than `width` is one shingle, so that no set is empty. A shingle is named by 64
    bits: among a million shingles two different ones share a name with probability 3e-8.

    Args:
      texts: N texts.
      width: k, characters of a shingle, at least 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    sets = [np.unique(_hashes(text, width)) for text in texts]
    sizes = [len(found) for found in sets]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    return Shingles(np.concatenate([np.zeros(0, np.uint64), *sets]), offsets)


def mix64(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64 values one to one: the last step of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashes(text: str, width: int) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = max(len(codes) - width + 1, 1)
    hashes = np.full(windows, len(codes[:width]), np.uint64)
    for place in range(min(width, len(codes))):
        hashes = mix64(hashes ^ codes[place : place + windows])
    return hashes
