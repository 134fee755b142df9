"""A tokenizer's identity is its meaning: not the file's form, and every part that moves an id."""

import json
from typing import Any

import pytest

from fedjax_llm.data.harmonise import check_agreement, identify
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer


def rebuilt(tokenizer: Tokenizer, change: Any = None, **other: Any) -> Tokenizer:
    data = json.loads(tokenizer.json_text)
    if change is not None:
        change(data)
    special = dict(tokenizer.special_tokens) | other.pop("special", {})
    template = other.pop("template", tokenizer.chat_template)
    return build_tokenizer(json.dumps(data, **other), special, template)


def test_the_form_of_the_file_does_not_matter(chat_tokenizer: Tokenizer) -> None:
    def merges_as_text(data: dict[str, Any]) -> None:
        data["model"]["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in data["model"]["merges"]
        ]

    def padded(data: dict[str, Any]) -> None:
        data["truncation"] = {
            "max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
        }  # fmt: skip

    def reversed_vocabulary(data: dict[str, Any]) -> None:
        data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))

    same = identify(chat_tokenizer)
    for change, options in (
        (merges_as_text, {}),
        (padded, {}),
        (reversed_vocabulary, {"indent": 4}),
        (None, {"sort_keys": True, "ensure_ascii": True}),
    ):
        other = rebuilt(chat_tokenizer, change, **options)
        assert identify(other) == same
        assert other.sha256 != chat_tokenizer.sha256 or change is None  # the files do differ


def test_every_part_that_moves_an_id_is_seen_and_named(chat_tokenizer: Tokenizer) -> None:
    def swap_merges(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def swap_ids(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        one, two = list(vocab)[100:102]
        vocab[one], vocab[two] = vocab[two], vocab[one]

    def lower(data: dict[str, Any]) -> None:
        data["normalizer"] = {"type": "Lowercase"}

    same = identify(chat_tokenizer)
    for change, options, part in (
        (swap_merges, {}, "merges"),
        (swap_ids, {}, "vocabulary"),
        (lower, {}, "normaliser"),
        (None, {"template": "{{ messages }}"}, "template"),
        (None, {"template": None}, "template"),
        (None, {"special": {"pad_token": "<|im_end|>"}}, "special tokens"),
    ):
        other = identify(rebuilt(chat_tokenizer, change, **options))
        assert same.differing(other) == [part]
        assert other.digest != same.digest


def test_clouds_that_declare_another_tokenizer_are_refused(chat_tokenizer: Tokenizer) -> None:
    digest = identify(chat_tokenizer).digest
    check_agreement({}, chat_tokenizer)
    check_agreement({"one": digest, "two": digest.upper()}, chat_tokenizer)
    with pytest.raises(UserError, match=r"cloud 'two' declares tokenizer 0{12}\.\.\., .*copy the"):
        check_agreement({"one": digest, "two": "0" * 64}, chat_tokenizer)
    for wrong in ("", "xyz", "g" * 64, digest[:-1]):
        with pytest.raises(UserError, match="must be 64 hexadecimal digits"):
            check_agreement({"one": wrong}, chat_tokenizer)


def test_two_real_tokenizers_differ(
    smollm2_tokenizer: Tokenizer, llama_tokenizer: Tokenizer
) -> None:
    one, two = identify(smollm2_tokenizer), identify(llama_tokenizer)
    assert {"vocabulary", "merges", "template"} <= set(one.differing(two))
