"""Adapters in the file format of the PEFT library: adapter_config.json and safetensors."""

import math
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fedjax_llm.errors import UserError
from fedjax_llm.lora.adapter import Adapter, LoraConfig, LowRank
from fedjax_llm.models.checkpoint import TensorFiles, layer_module, read_json, write_json
from fedjax_llm.models.config import DecoderConfig, projection_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Settings whose value does not change what the adapter computes, or that are read below. Any
# other setting, today's or a future one's, must be off: then nothing is silently left out.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# These ways to start an adapter also change the base weights, which the file does not carry.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)


def read_peft(folder: Path | str, config: DecoderConfig) -> Adapter:
    """Reads a LoRA adapter saved by PEFT or by ``write_peft``.

    Args:
      folder: Holds adapter_config.json and adapter_model.safetensors.
      config: Of the model that the adapter is for.

    Raises:
      UserError: A missing or damaged file, a setting that is not supported (by name), or a tensor
        that is missing, unexpected, of the wrong shape or not finite.
    """
    folder = Path(folder)
    rank, scale = _read_settings(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    files = TensorFiles({"": path})
    shapes = projection_shapes(config)
    found: set[str] = set()
    for key in sorted(files.names):
        match = _KEY.fullmatch(key)
        name = match[2] if match else ""
        if name not in shapes or key != _key(int(match[1]) if match else 0, name, key[-8]):
            raise UserError(f"{path} holds the unsupported tensor {key}; train without it")
        if match and int(match[1]) >= config.num_layers:
            raise UserError(
                f"{path}: tensor {key} belongs to no layer, the model has {config.num_layers}; "
                "use the model that the adapter was trained on"
            )
        found.add(name)
    if not found:
        raise UserError(f"{path} holds no LoRA tensors; give the folder of an adapter")

    def stack(name: str, side: str, shape: tuple[int, int]) -> np.ndarray:
        layers = []
        for layer in range(config.num_layers):
            key = _key(layer, name, side)
            if key not in files.names:
                raise UserError(
                    f"{path} lacks tensor {key}; adapters of some layers only are not supported"
                )
            layers.append(files.read(key, shape).T.astype(np.float32))
        return np.stack(layers)

    factors = {}
    for name, (inputs, outputs) in shapes.items():
        if name in found:
            a_LxDxR = stack(name, "A", (rank, inputs))
            b_LxRxF = stack(name, "B", (outputs, rank))
            factors[name] = LowRank(jnp.asarray(a_LxDxR), jnp.asarray(b_LxRxF))
    return Adapter(factors, scale)


def write_peft(
    folder: Path | str, adapter: Adapter, lora: LoraConfig, base_model_name: str
) -> None:
    """Writes an adapter that PEFT loads onto the model of that name.

    adapter_config.json is written last, so a folder that has one is whole.

    Args:
      folder: Made if missing; an adapter in it is replaced.
      adapter: The adapter, without a client axis.
      lora: Its rank and alpha.
      base_model_name: Name or folder of the base model, for PEFT to find it.

    Raises:
      UserError: ``lora`` does not describe ``adapter``.
    """
    folder = Path(folder)
    tensors = {}
    for name, (a_LxDxR, b_LxRxF) in adapter.factors.items():
        if a_LxDxR.ndim != 3 or a_LxDxR.shape[-1] != lora.rank:
            raise UserError(
                f"adapter factor {name} has shape {a_LxDxR.shape}, rank {lora.rank} was expected; "
                "pass the LoraConfig of this adapter"
            )
        for side, factor in (("A", np.asarray(a_LxDxR)), ("B", np.asarray(b_LxRxF))):
            for layer, matrix in enumerate(factor):
                tensors[_key(layer, name, side)] = np.ascontiguousarray(matrix.T)
    if not math.isclose(adapter.scale, lora.scale, rel_tol=1e-6):
        raise UserError(
            f"the adapter's scale is {adapter.scale}, alpha / rank is {lora.scale}; "
            "pass the LoraConfig of this adapter"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS_FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS_FILE)
    write_json(
        folder / CONFIG_FILE,
        {
            "base_model_name_or_path": base_model_name,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": lora.rank,
            "target_modules": list(adapter.factors),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        },
    )


def _key(layer: int, name: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{layer_module(name)}.lora_{side}.weight"


def _read_settings(path: Path) -> tuple[int, float]:
    """Rank and scale."""
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {settings.get('peft_type')!r} is not supported; use LORA"
        )
    for name, value in settings.items():
        if name not in _HARMLESS and not _is_off(value):
            raise UserError(f"{path}: {name}={value!r} is not supported; train without it")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise UserError(
            f"{path}: init_lora_weights={start!r} changes the base weights, which are not in the "
            "adapter; convert it to plain LoRA with PEFT first"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r} are not numbers; mend them")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_off(value: Any) -> bool:
    return value in (None, False, "none", {}, [])
