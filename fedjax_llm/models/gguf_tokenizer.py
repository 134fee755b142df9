"""The tokenizer inside a GGUF file, as a Hugging Face `tokenizer.json`.

Two kinds occur with the architectures read here (`tokenizer.ggml.model`): "gpt2", byte-level BPE
with merges, and "llama", SentencePiece BPE with scores. The file names the way that text is cut
before merging (`tokenizer.ggml.pre`) but does not describe it; the cuts are those of the models'
own tokenizers.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama2c
from fedjax_llm.models.gguf_file import items, scalar
from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4

# Contractions and letters as in GPT-4's cut; the third alternative is the length of digit groups.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
# Every digit by itself, then GPT-2's cut.
_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r"})


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _pre_tokenizer(name: str) -> dict[str, Any]:
    steps: list[dict[str, Any]]
    if name in _DIGITS_THEN_GPT2:
        steps = [{"type": "Digits", "individual_digits": True}, _byte_level(True)]
    elif name == "gpt-2":
        return _byte_level(True)
    elif name in _REGEX:
        pattern = {"Regex": _LETTERS + _REGEX[name] + _REST}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [split, _byte_level(False)]
    else:
        known = sorted({*_DIGITS_THEN_GPT2, *_REGEX, "gpt-2"})
        raise UserError(
            f"GGUF pre-tokenizer {name!r} is not known, only {', '.join(known)}; "
            "use the model's Hugging Face folder instead"
        )
    return {"type": "Sequence", "pretokenizers": steps}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from the `tokenizer.*` metadata of a GGUF file.

    Raises:
        UserError: metadata is missing or inconsistent, or of a kind that is not known.
    """
    kind = scalar(metadata, "tokenizer.ggml.model", str)
    pieces = items(metadata, "tokenizer.ggml.tokens", str)
    types = items(metadata, "tokenizer.ggml.token_type", int, [_NORMAL] * len(pieces))
    ids = {
        key: scalar(metadata, f"tokenizer.ggml.{name}_token_id", int)
        if f"tokenizer.ggml.{name}_token_id" in metadata
        else None
        for key, name in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    # llama.cpp's defaults where a SentencePiece vocabulary names none.
    if kind == "llama":
        for key, default in (("unk_token", 0), ("bos_token", 1), ("eos_token", 2)):
            ids[key] = default if ids[key] is None else ids[key]
    for key, index in ids.items():
        if index is not None and not 0 <= index < len(pieces):
            raise UserError(
                f"GGUF {key} is {index}, outside {len(pieces)} tokens; use another file"
            )
    if len(types) != len(pieces):
        raise UserError(
            f"GGUF file holds {len(pieces)} tokens but {len(types)} token types; use another file"
        )
    special_tokens = {key: pieces[index] for key, index in ids.items() if index is not None}
    if kind == "gpt2":
        json_text = _byte_bpe(metadata, pieces, types, special_tokens)
    elif kind == "llama":
        json_text = _sentencepiece(metadata, pieces, types, special_tokens)
    else:
        raise UserError(
            f"GGUF tokenizer {kind!r} is not known, only 'gpt2' and 'llama'; "
            "use the model's Hugging Face folder instead"
        )
    template = None
    if "tokenizer.chat_template" in metadata:
        template = scalar(metadata, "tokenizer.chat_template", str)
    return build_tokenizer(json_text, special_tokens, template, origin="the GGUF file's tokenizer")


def _sentencepiece(
    metadata: Mapping[str, Any], pieces: list[str], types: list[int], special: Mapping[str, str]
) -> str:
    scores = items(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(pieces):
        raise UserError(
            f"GGUF file holds {len(pieces)} tokens but {len(scores)} scores; use another file"
        )
    if not all(map(math.isfinite, scores)):
        raise UserError("GGUF token scores hold NaN or infinity; download the file again")
    return llama2c.score_bpe_json(
        pieces,
        scores,
        mergeable=[kind == _NORMAL for kind in types],
        special={p: i for i, p in enumerate(pieces) if types[i] in (_UNKNOWN, _CONTROL)},
        plain_added={p: i for i, p in enumerate(pieces) if types[i] == _USER},
        space="▁",
        add_space_prefix=scalar(metadata, "tokenizer.ggml.add_space_prefix", bool, True),
        add_bos=scalar(metadata, "tokenizer.ggml.add_bos_token", bool, True),
        unknown=special["unk_token"],
        bos=special["bos_token"],
    )


def _byte_bpe(
    metadata: Mapping[str, Any], pieces: list[str], types: list[int], special: Mapping[str, str]
) -> str:
    if "tokenizer.ggml.pre" not in metadata:
        raise UserError(
            "GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre); "
            "convert the model again with a newer llama.cpp"
        )
    pre = scalar(metadata, "tokenizer.ggml.pre", str)
    merges = [merge.split(" ") for merge in items(metadata, "tokenizer.ggml.merges", str)]
    broken = next((merge for merge in merges if len(merge) != 2), None)
    if broken is not None:
        raise UserError(f"GGUF merge {' '.join(broken)!r} is not a pair; use another file")
    post_processor = None
    if scalar(metadata, "tokenizer.ggml.add_bos_token", bool, False) and "bos_token" in special:
        bos = special["bos_token"]
        piece = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        post_processor = {
            "type": "TemplateProcessing",
            "single": [piece, first],
            "pair": [piece, first, piece, second],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.index(bos)], "tokens": [bos]}},
        }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": piece,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": types[index] != _USER,
                }
                for index, piece in enumerate(pieces)
                if types[index] in (_UNKNOWN, _CONTROL, _USER)
            ],
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": _pre_tokenizer(pre),
            "post_processor": post_processor,
            "decoder": {**_byte_level(True), "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # Llama 3's vocabulary holds words that its merges do not reach.
                "ignore_merges": pre == "llama-bpe",
                "vocab": {piece: index for index, piece in enumerate(pieces)},
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )
