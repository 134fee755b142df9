"""Tokenizers for the data tests: a byte-level one trained here, and the real ones where present."""

from pathlib import Path

import pytest
import tokenizers

from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

# SmolLM2's template, whose render is in ../shared/reference.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


def trained_json() -> str:
    """A byte-level BPE of 600 tokens, trained on a few sentences: every text survives it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["What are the symptoms of asthma? Signs: wheezing, cough and breathlessness."] * 4
    backend.train_from_iterator([*text, "system user assistant\nAnswer briefly. yes no"], trainer)
    return str(backend.to_str())


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
