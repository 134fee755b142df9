"""Tokenizers for the data tests: a byte-level one trained here, and the real ones where present."""

from pathlib import Path

import pytest

from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from tests.small_tokenizer import CHATML, SPECIAL, trained_json


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    return build_tokenizer(trained_json(), SPECIAL, CHATML)


@pytest.fixture(scope="session")
def plain_tokenizer() -> Tokenizer:
    return build_tokenizer(trained_json(), SPECIAL)


@pytest.fixture(scope="session")
def llama_tokenizer(stories260k: Path) -> Tokenizer:
    """A sentencepiece tokenizer that begins every text with a token, as Llama's does."""
    return load_tokenizer(stories260k)


@pytest.fixture(scope="session")
def smollm2_tokenizer(shared: Path) -> Tokenizer:
    path = shared / "models" / "tokenizers" / "smollm2_tokenizer.json"
    special = SPECIAL | {"pad_token": "<|im_end|>"}
    return build_tokenizer(path.read_text("utf-8"), special, CHATML)
