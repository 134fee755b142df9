"""The common record: what every cloud's rows become, whatever their own columns are called."""

import unicodedata
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Record:
    """One example for training or evaluation.

    A record without prompt and context is plain text: the model learns the whole `answer`.

    Attributes:
      prompt: What the user asks.
      answer: What the model should say; never empty after `map_rows`.
      context: A passage that the prompt refers to; shown before the prompt.
      label: The class of a classification row, for measuring accuracy.
      group: What must not straddle the split into training and evaluation, such as the question
        that several paraphrases share. Empty means: the prompt itself (`splitting.group_key`).
      user: Whose example it is, where a user is the unit of privacy; a user does not straddle the
        split either.
      source: Where the row came from, such as the name of its file; not part of what it says, so
        that two records of different sources can be equal.
    """

    prompt: str
    answer: str
    context: str = ""
    label: str = ""
    group: str = ""
    user: str = ""
    source: str = field(default="", compare=False)


def normalise_text(text: str) -> str:
    r"""Returns the text in Unicode form NFC, with `\n` line ends and no white space around it.

    Clouds type the same letter as one or as two code points; a tokenizer would see two words.

    Example:
      >>> normalise_text(" cafe\u0301\r\n") == "caf\u00e9"
      True
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
