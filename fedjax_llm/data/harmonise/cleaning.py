r"""Cleaning: one Unicode form, no invisible characters, one way to write white space.

Two clouds that type the same sentence should give the model the same tokens. What a reader sees
stays as it is:

| kind | what becomes of it |
|---|---|
| line ends `\r\n`, `\r`, U+0085, U+2028, U+2029 | `\n` |
| spaces of other widths (category Zs, as U+00A0) | a space |
| control characters (Cc) but tab and line end | removed |
| soft hyphen, zero-width space, word joiner, byte-order mark | removed |
| bidirectional embeddings, overrides and isolates (U+202A-E, U+2066-9) | removed |
| joiners U+200C-D, marks U+200E-F | kept: Persian, Indic scripts, emoji need them |
| composed and decomposed letters | form NFC |
| spaces at the end of a line, runs of them inside it, more than one empty line | removed |
| indentation, tabs | kept: code and tables need them |

Bidirectional overrides make a text read otherwise than it is stored (arXiv 2111.00169). The form
is NFC and not NFKC because NFKC changes what is said: `10²` becomes `102` and a dose of
`½` becomes `1⁄2` (Unicode Standard Annex 15, section 1.2 on compatibility equivalence).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.records import Record

_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_INVISIBLE = {0xAD, 0x200B, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# The last space of any kind is U+3000, the last control character far below it.
_TABLE: dict[int, str | None] = dict.fromkeys(_INVISIBLE) | {
    code: " " if unicodedata.category(chr(code)) == "Zs" else None
    for code in range(0x3001)
    if unicodedata.category(chr(code)) in ("Cc", "Zs") and chr(code) not in "\t\n"
}
_INNER_SPACES = re.compile(r"(?<=\S) {2,}(?=\S)")
_LINE_TAIL = re.compile(r"[ \t]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    r"""Returns the text as the table of this module says; cleaning twice changes nothing more.

    Example:
      >>> clean_text("cafe\u0301\u00a0 au\u200b lait \r\n\r\n\r\n  2\u00b2")
      'café au lait\n\n  2²'
    """
    text = _LINE_ENDS.sub("\n", text).translate(_TABLE)
    # NFC comes after the removals, which bring a letter and its accent together.
    text = unicodedata.normalize("NFC", text)
    text = _LINE_TAIL.sub("", _INNER_SPACES.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def clean_records(records: Sequence[Record]) -> tuple[list[Record], Step]:
    """Cleans prompt, context and answer of every record.

    Label, group and user are names by which rows are compared, and stay as they are.

    Args:
      records: N records of one cloud.

    Returns:
      The records in their order without those of which nothing is left to learn, and the count.
    """
    kept: list[Record] = []
    changed = empty_answers = empty_prompts = 0
    for record in records:
        cleaned = replace(
            record,
            prompt=clean_text(record.prompt),
            context=clean_text(record.context),
            answer=clean_text(record.answer),
        )
        if not cleaned.answer:
            empty_answers += 1
        elif (record.prompt or record.context) and not (cleaned.prompt or cleaned.context):
            # Without its question a row would turn into plain text to be learnt whole.
            empty_prompts += 1
        else:
            changed += cleaned != record
            kept.append(cleaned)
    dropped = {
        "nothing visible in the answer": empty_answers,
        "nothing visible in the prompt": empty_prompts,
    }
    return kept, Step("cleaning", len(records), counted(dropped), changed)
