"""Writing and reading folders of weights, and what damaged folders say."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedjax_llm.errors import UserError
from fedjax_llm.models import DecoderConfig, init_base, load_config, load_model, save_model
from fedjax_llm.models.checkpoint import read_base, write_base

CONFIG = DecoderConfig(17, 8, 12, 2, 2, 1, 4, qkv_bias=True, architecture="Qwen2ForCausalLM")
CONFIGS = [
    CONFIG,
    dataclasses.replace(CONFIG, tie_embeddings=True),
    dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=True, architecture="Qwen3ForCausalLM"),
]
NAME = "model.layers.1.mlp.up_proj.weight"


def base_of(config: DecoderConfig):
    return init_base(config, jax.random.key(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_base(tmp_path / "model", CONFIG, base_of(CONFIG))
    return tmp_path / "model"


def change(folder: Path, function) -> None:
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 600, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_exact(tmp_path, config, max_shard_bytes, dtype):
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), base_of(config))
    write_base(tmp_path, config, base, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes == 10**9)
    assert load_config(tmp_path) == config
    again = read_base(tmp_path, config, dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, again, base)
    wider = read_base(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, wider, jax.tree.map(jnp.float32, base))


def test_shards_keep_to_the_limit_and_the_index_covers_them(tmp_path):
    write_base(tmp_path, CONFIG, base_of(CONFIG), max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert len(files) > 1 and max(sizes) <= 1000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_the_file_holds_linear_maps_as_outputs_by_inputs(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors[NAME].shape == (12, 8)
    np.testing.assert_array_equal(
        tensors[NAME].T, base_of(CONFIG)["layers"]["up_proj"]["kernel"][1]
    )


def test_a_real_model_saved_and_loaded_is_the_same(stories260k, tmp_path):
    model = load_model(stories260k)
    save_model(tmp_path, model.config, model.base, model.tokenizer, max_shard_bytes=100_000)
    again = load_model(tmp_path)
    assert again.config == model.config and again.tokenizer.sha256 == model.tokenizer.sha256
    jax.tree.map(np.testing.assert_array_equal, again.base, model.base)


def test_a_folder_with_a_model_is_not_overwritten(folder):
    with pytest.raises(UserError, match="already holds a model"):
        write_base(folder, CONFIG, base_of(CONFIG))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_base(folder, CONFIG)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is damaged" in refusal(folder)


def test_a_missing_tensor(folder):
    change(folder, lambda tensors: tensors.pop(NAME))
    assert NAME in refusal(folder)


def test_an_unexpected_tensor(folder):
    change(folder, lambda tensors: tensors.update({"model.more": np.zeros(2, np.float32)}))
    assert "unexpected tensor model.more" in refusal(folder)


def test_rotary_frequencies_of_old_files_are_passed_over(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: np.zeros(2, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, read_base(folder, CONFIG), base_of(CONFIG))


def test_a_wrong_shape(folder):
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].T.copy()}))
    assert f"{NAME} has shape (8, 12), config.json means (12, 8)" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(folder, value):
    change(folder, lambda tensors: tensors[NAME].__setitem__((3, 3), value))
    assert f"{NAME} holds NaN or infinite" in refusal(folder)


def test_quantised_weights(folder):
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.int8)}))
    assert f"{NAME} has type I8" in refusal(folder)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_embedding_in_a_tied_model(tmp_path, same):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    write_base(tmp_path, config, base_of(config))

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)

    change(tmp_path, add)
    if same:
        read_base(tmp_path, config)
    else:
        with pytest.raises(UserError, match="tie_word_embeddings"):
            read_base(tmp_path, config)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path, file):
    write_base(tmp_path, CONFIG, base_of(CONFIG), max_shard_bytes=1000)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {NAME: file}}))
    assert "not a plain name" in refusal(tmp_path)


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path):
    write_base(tmp_path, CONFIG, base_of(CONFIG), max_shard_bytes=1000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(second)
    name, _ = tensors.popitem()
    save_file(tensors, second)
    assert f"{second.name} lacks tensor {name}" in refusal(tmp_path)
    first.unlink()
    assert f"{first.name} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_model(tmp_path / "nowhere")
