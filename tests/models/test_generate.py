"""Cached greedy generation against argmax over the whole sequence each time."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import DecoderConfig, Model, apply, generate, init_base

PLAIN = DecoderConfig(61, 24, 40, 2, 4, 2, 6, max_positions=64)
CONFIGS = [
    PLAIN,
    dataclasses.replace(PLAIN, sliding_window=5, architecture="MistralForCausalLM"),
    dataclasses.replace(PLAIN, qk_norm=True, architecture="Qwen3ForCausalLM"),
]


def model_of(config: DecoderConfig) -> Model:
    no_tokenizer = cast(Any, None)  # ids go in and come out
    return Model(config, init_base(config, jax.random.key(0)), no_tokenizer, Path())


def slow(model: Model, adapter, prompt: list[int], count: int) -> list[int]:
    # Zeros after the text change nothing before them, and keep one shape for the compiler.
    tokens = jnp.zeros((1, 32), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    logits_of = jax.jit(apply, static_argnums=0)
    for end in range(len(prompt), len(prompt) + count):
        logits = logits_of(model.config, model.base, adapter, tokens)
        tokens = tokens.at[0, end].set(logits[0, end - 1].argmax().astype(jnp.int32))
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_generation_without_a_cache(config):
    model = model_of(config)
    adapter = init_adapter(config, LoraConfig(2, 4.0, ("all-linear",)), jax.random.key(1))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    prompt = [5, 9, 2, 33, 60, 1, 7]
    assert generate(model, adapter, prompt, 9) == slow(model, adapter, prompt, 9)


def test_a_prompt_longer_than_its_bucket_boundary():
    model = model_of(PLAIN)
    for length in (16, 17):
        prompt = [(7 * i) % 61 for i in range(length)]
        assert generate(model, None, prompt, 3) == slow(model, None, prompt, 3)


def test_ends_before_an_end_token_and_a_shorter_limit_is_a_prefix():
    model = model_of(PLAIN)
    tokens = generate(model, None, [5, 9], 12)
    assert len(tokens) == 12 and generate(model, None, [5, 9], 4) == tokens[:4]
    end = tokens[6]
    ending = dataclasses.replace(
        model, config=dataclasses.replace(PLAIN, eos_token_ids=(60 if end != 60 else 59, end))
    )
    got = generate(ending, None, [5, 9], 12)
    assert end not in got and got == tokens[: len(got)] and len(got) <= tokens.index(end)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 3, "empty"),
        ([61], 3, "outside the vocabulary"),
        ([-1], 3, "outside the vocabulary"),
        ([1], 0, "at least 1"),
        ([1] * 60, 5, "64 positions"),
    ],
)
def test_mistakes_are_named(prompt, count, message):
    with pytest.raises(UserError, match=message):
        generate(model_of(PLAIN), None, prompt, count)
