"""Tokenizer identity: one hash of everything by which a tokenizer turns a conversation into ids.

Clouds that train one model must agree on every id. Two files of one tokenizer may differ in the
order of keys, in spacing, or in how merges are written, and still give the same ids; and two
tokenizers of one vocabulary may differ in a merge or in the chat template. So what is hashed is the
meaning and not the file: each part in a canonical form, and the parts together.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

_HEX = 64


@dataclass(frozen=True)
class TokenizerIdentity:
    """The sha256 of each part of a tokenizer, hexadecimal.

    Attributes:
      vocabulary: Pieces with their ids, and the kind of model with its settings.
      merges: In their order; pieces with scores where there are scores in place of merges.
      special_tokens: Added tokens with their flags, and the ids that begin, end and pad.
      normaliser: What is done to a text before it is cut, the cuts, and what is put around it.
      template: The chat template.
    """

    vocabulary: str
    merges: str
    special_tokens: str
    normaliser: str
    template: str

    @property
    def digest(self) -> str:
        """The sha256 of all parts, 64 hexadecimal digits: what clouds declare."""
        return _hash({part.name: getattr(self, part.name) for part in fields(self)})

    def differing(self, other: "TokenizerIdentity") -> list[str]:
        """The names of the parts in which two tokenizers differ."""
        return [
            part.name.replace("_", " ")
            for part in fields(self)
            if getattr(self, part.name) != getattr(other, part.name)
        ]


def identify(tokenizer: Tokenizer) -> TokenizerIdentity:
    """The identity of a tokenizer.

    Truncation and padding that a file may set are left out: batches do both, in one place.
    """
    data: dict[str, Any] = json.loads(tokenizer.json_text)
    model = dict(data.get("model") or {})
    vocabulary = model.pop("vocab", None)
    merges = model.pop("merges", None)
    if isinstance(vocabulary, list):  # Unigram: pieces with scores, in the order of ids
        pieces: Any = {"scores": vocabulary}
    else:
        pieces = {"ids": vocabulary}
    added = sorted(data.get("added_tokens") or [], key=lambda token: token["id"])
    around = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return TokenizerIdentity(
        vocabulary=_hash(
            {
                "pieces": pieces,
                "model": {name: value for name, value in model.items() if value is not None},
            }
        ),
        # Older files write a merge as one text, newer ones as a pair.
        merges=_hash([m.split(" ") if isinstance(m, str) else m for m in merges or []]),
        special_tokens=_hash(
            {"added": added, "ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]}
        ),
        normaliser=_hash({name: data.get(name) for name in around}),
        template=_hash(tokenizer.chat_template),
    )


def check_agreement(declared: Mapping[str, str], tokenizer: Tokenizer) -> None:
    """Checks that the clouds which declare a tokenizer declare this one.

    Args:
      declared: For each cloud that declares one, the digest it declares.
      tokenizer: Of the base model of the run.

    Raises:
      UserError: A declaration that is no digest, or another tokenizer; names cloud and remedy.
    """
    expected = identify(tokenizer).digest if declared else ""
    for cloud, digest in declared.items():
        if len(digest) != _HEX or set(digest.lower()) - set("0123456789abcdef"):
            raise UserError(
                f"cloud {cloud!r}: tokenizer must be {_HEX} hexadecimal digits, got "
                f"{digest[:20]!r}; print them with `fedjax-llm data tokenizer FOLDER`"
            )
        if digest.lower() != expected:
            raise UserError(
                f"cloud {cloud!r} declares tokenizer {digest[:12]}..., the run's base model has "
                f"{expected[:12]}...; copy the base model's tokenizer files to that cloud, or "
                "compare both with `fedjax-llm data tokenizer FOLDER FOLDER`"
            )


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
