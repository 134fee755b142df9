"""Adapters in PEFT's files: real ones, round trips, and everything that is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedjax_llm.errors import UserError
from fedjax_llm.lora import LoraConfig, init_adapter, read_peft, write_peft
from fedjax_llm.models import DecoderConfig, load_config

CONFIG = DecoderConfig(61, 24, 40, 2, 4, 2, 6)
LORA = LoraConfig(2, 6.0, ("all-linear",))
KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def adapter_of(lora: LoraConfig = LORA):
    return jax.tree.map(lambda x: x + 0.1, init_adapter(CONFIG, lora, jax.random.key(0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", adapter_of(), LORA, "some/model")
    return tmp_path / "adapter"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_peft(folder, CONFIG)
    assert "\n" not in str(error.value)
    return str(error.value)


def settings(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, function) -> None:
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    function(values)
    save_file(values, path)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
def test_round_trip_is_exact(tmp_path, targets):
    lora = LoraConfig(2, 6.0, targets)
    adapter = adapter_of(lora)
    write_peft(tmp_path, adapter, lora, "some/model")
    again = read_peft(tmp_path, CONFIG)
    assert again.scale == adapter.scale == 3.0
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_the_files_of_peft_are_written_back_the_same(shared, tmp_path):
    original = shared / "reference" / "stories260K-peft-adapter"
    adapter = read_peft(original, load_config(shared / "models" / "stories260K"))
    assert adapter.scale == 4.0 and set(adapter.factors) == {"q_proj", "v_proj"}
    write_peft(tmp_path, adapter, LoraConfig(4, 16.0, ("q_proj", "v_proj")), "stories260K")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = load_file(original / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    mine = json.loads((tmp_path / "adapter_config.json").read_text())
    real = json.loads((original / "adapter_config.json").read_text())
    assert {key: real[key] for key in mine} == mine


def test_rslora_divides_by_the_root_of_the_rank(folder):
    settings(folder, use_rslora=True)
    assert read_peft(folder, CONFIG).scale == pytest.approx(6.0 / 2**0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2]]},
        {"fan_in_fan_out": True},
        {"target_parameters": ["x"]},
        {"trainable_token_indices": [3]},
        {"a_setting_of_next_year": 1},
        {"init_lora_weights": "pissa_niter_4"},
        {"peft_type": "ADALORA"},
        {"r": "2"},
        {"lora_alpha": None},
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, change):
    settings(folder, **change)
    assert next(iter(change)) in refusal(folder)


def test_missing_files(folder):
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(folder)
    shutil.rmtree(folder)
    assert "adapter_config.json is missing" in refusal(folder)


def test_a_truncated_file(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "damaged" in refusal(folder)


def test_tensors_that_are_missing_unexpected_misshapen_or_not_finite(folder):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    strange = KEY.replace("lora_B", "lora_magnitude_vector")
    moved = KEY.replace("mlp", "self_attn")
    deep = KEY.replace("layers.1", "layers.2")
    small = np.zeros((1,), np.float32)
    for function, message in (
        (lambda t: t.pop(KEY), f"lacks tensor {KEY}"),
        (lambda t: t.update({strange: small}), strange),
        (lambda t: t.update({moved: small}), moved),
        (lambda t: t.update({deep: small}), "the model has 2"),
        (lambda t: t.update({KEY: small}), f"{KEY} has shape"),
        (lambda t: t[KEY].__setitem__((0, 0), np.nan), f"{KEY} holds NaN"),
        (lambda t: t.clear(), "no LoRA tensors"),
    ):
        (folder / "adapter_model.safetensors").write_bytes(whole)
        tensors(folder, function)
        assert message in refusal(folder)


def test_a_config_that_does_not_describe_the_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="rank 3 was expected"):
        write_peft(tmp_path, adapter_of(), LoraConfig(3, 9.0, ("all-linear",)), "m")
    with pytest.raises(UserError, match="scale is 3"):
        write_peft(tmp_path, adapter_of(), LoraConfig(2, 2.0, ("all-linear",)), "m")
    assert not list(tmp_path.iterdir())
