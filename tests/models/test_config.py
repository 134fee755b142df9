"""Reading and writing config.json."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.models import DecoderConfig, RopeScaling, load_config, projection_shapes

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "values",
    [
        LLAMA,
        LLAMA | {"rope_scaling": LLAMA3, "eos_token_id": [3, 5], "num_key_value_heads": 2},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
        SIZES | {"architectures": ["MistralForCausalLM"], "sliding_window": 7, "head_dim": 6},
        SIZES | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 7},
        SIZES
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 7,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        SIZES | {"architectures": ["Qwen3ForCausalLM"]},
    ],
)
def test_round_trip(values):
    config = DecoderConfig.from_hf(values)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_what_each_family_means():
    config = DecoderConfig.from_hf(SIZES | {"architectures": ["Qwen2ForCausalLM"]})
    assert config.qkv_bias and not config.qk_norm and config.sliding_window is None
    config = DecoderConfig.from_hf(SIZES | {"architectures": ["Qwen3ForCausalLM"]})
    assert config.qk_norm and not config.qkv_bias and config.head_dim == 128
    assert projection_shapes(config)["q_proj"] == (32, 512)
    assert projection_shapes(config)["o_proj"] == (512, 32)
    llama = DecoderConfig.from_hf(LLAMA | {"sliding_window": 7})
    assert llama.head_dim == 8 and llama.sliding_window is None


def test_both_spellings_of_rope():
    old = DecoderConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = DecoderConfig.from_hf(LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported"),
        ({"architectures": None}, "no name under architectures"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"hidden_size": "32", "head_dim": 8}, "positive integer, got '32'"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"head_dim": 7}, "even"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "at least 1"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "max_window_layers=1",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as error:
        DecoderConfig.from_hf(LLAMA | change)
    assert "\n" not in str(error.value)


def test_generation_config_adds_the_tokens_that_end_a_turn(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert load_config(tmp_path).eos_token_ids == (2, 9)
