"""Conversion of a GGUF model to a Hugging Face folder.

llama.cpp's converter interleaves the halves of every head in the query and key projections of the
architecture "llama" (its rotary embedding turns neighbouring pairs); this is undone, so that the
weights are those that the model was published with, up to quantisation. Other architectures are
stored as published.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.models.gguf_file import GgufFile, GgufTensor, read_gguf, scalar, to_float
from fedjax_llm.models.gguf_tokenizer import tokenizer_from_gguf

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{n}.bias": f"self_attn.{n}_proj.bias" for n in "qkv"}
_HEAD_NORMS = {f"attn_{n}_norm.weight": f"self_attn.{n}_norm.weight" for n in "qk"}
_SAFETENSORS_TYPES = {"F16": "F16", "BF16": "BF16"}  # all else becomes F32


@dataclass(frozen=True)
class _Entry:
    """One output tensor: its name, its GGUF name, its shape, and the heads to un-interleave."""

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int = 0


def import_gguf(gguf_path: Path | str, out_folder: Path | str) -> Path:
    """Writes a GGUF model as a Hugging Face folder.

    `config.json`, `generation_config.json`, `model.safetensors` (float16 and bfloat16 as stored,
    all other types dequantised to float32), `tokenizer.json`, `tokenizer_config.json`. Peak memory
    is a few times the largest tensor. The folder appears complete or not at all.

    Args:
        gguf_path: the file; architectures llama (also Mistral), qwen2 and qwen3.
        out_folder: must not exist yet, or be empty.

    Returns:
        `out_folder` as a Path.

    Raises:
        UserError: file missing, truncated, invalid, of another architecture, or holding a NaN or an
            infinity; output folder in use or not writable.
    """
    source, out = read_gguf(gguf_path), Path(out_folder)
    config = _config(source)
    tokenizer = tokenizer_from_gguf(source.metadata)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise UserError(
            f"{source.path} holds {tokenizer.vocab_size} tokens but embeds {config['vocab_size']}; "
            "download the file again"
        )
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    entries = _entries(source, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder or remove it")
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        partial.chmod(0o755)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer.save(partial)
        _write_safetensors(partial / "model.safetensors", source, entries)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; check the folder and the free space"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _config(source: GgufFile) -> dict[str, Any]:
    architecture = scalar(source.metadata, "general.architecture", str)
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"GGUF architecture {architecture!r} is not supported, only llama (also Mistral), "
            "qwen2 and qwen3; choose another model"
        )

    def whole(key: str, default: int | None = None) -> int:
        return scalar(source.metadata, f"{architecture}.{key}", int, default)

    def real(key: str, default: float | None = None) -> float:
        return scalar(source.metadata, f"{architecture}.{key}", float, default)

    experts = whole("expert_count", 0)
    if experts:
        raise UserError(
            f"{source.path} is a mixture of {experts} experts, which is not supported; "
            "choose a dense model"
        )
    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    layers = whole("block_count")
    queries = (f"blk.{layer}.attn_q.weight" for layer in range(layers))
    if not heads or not layers or any(name not in source.tensors for name in queries):
        raise UserError(
            f"{source.path} does not hold the {layers} attention layers that it states; "
            "use a complete model file"
        )
    head_dim = whole("attention.key_length", hidden // heads)
    rotary = whole("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UserError(
            f"{source.path} rotates {rotary} of {head_dim} dimensions per head, which is not "
            "supported; choose another model"
        )
    window = whole("attention.sliding_window", 0)
    family = "mistral" if architecture == "llama" and window else architecture
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": _table_rows(source),
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": whole("context_length"),
        "rope_theta": real("rope.freq_base", 10000.0),
        "rope_scaling": None,
        # Stored as float32; the shortest decimal that gives the same float32 is what was published.
        "rms_norm_eps": float(str(np.float32(real("attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "hidden_act": "silu",
        "torch_dtype": _main_dtype(source),
    }
    if family in ("llama", "qwen3"):
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in source.tensors,
            "mlp_bias": False,
        }
    if window and family == "mistral":
        config["sliding_window"] = window
    config["rope_scaling"] = _rope_scaling(source, architecture, config)
    return config


def _table_rows(source: GgufFile) -> int:
    table = source.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{source.path} holds no token_embd.weight; use a complete model file")
    return table.shape[0]


def _main_dtype(source: GgufFile) -> str:
    stored = source.tensors["blk.0.attn_q.weight"].type_name
    return {"F16": "float16", "BF16": "bfloat16"}.get(stored, "float32")


def _rope_scaling(
    source: GgufFile, architecture: str, config: dict[str, Any]
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in source.tensors:
        return _llama3_scaling(source, config)
    kind = scalar(source.metadata, f"{architecture}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind == "linear":
        factor = scalar(source.metadata, f"{architecture}.rope.scaling.factor", float)
        return {"rope_type": "linear", "factor": factor}
    raise UserError(
        f"{source.path} scales its rotary embedding by {kind!r}, only 'linear' and Llama 3's are "
        "supported; choose another model"
    )


def _llama3_scaling(source: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, which llama.cpp stores as the divisor of every frequency."""
    stored = to_float(source.tensors["rope_freqs.weight"]).astype(np.float64).ravel()
    low, high, original = 1.0, 4.0, 8192
    # The lowest frequencies are divided by the whole factor.
    factor = float(stored.max())
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** exponents
    smooth = (original / wavelengths - low) / (high - low)
    divisors = 1 / np.clip((1 - smooth) / factor + smooth, 1 / factor, 1)
    if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-4):
        raise UserError(
            f"{source.path} scales its rotary embedding in a way that is not Llama 3's; "
            "use the model's Hugging Face folder instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _entries(source: GgufFile, config: dict[str, Any]) -> list[_Entry]:
    """Every output tensor with its shape; checks that the file holds these and no others."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_dim, kv_dim = heads * config["head_dim"], kv_heads * config["head_dim"]
    table = (config["vocab_size"], hidden)
    entries = [
        _Entry("model.embed_tokens.weight", "token_embd.weight", table),
        _Entry("model.norm.weight", "output_norm.weight", (hidden,)),
    ]
    if not config["tie_word_embeddings"]:
        entries.append(_Entry("lm_head.weight", "output.weight", table))
    names = dict(_LAYER_NAMES)
    if "blk.0.attn_q.bias" in source.tensors:
        names |= _BIASES
    if config["model_type"] == "qwen3":
        names |= _HEAD_NORMS
    rows = {"attn_q": q_dim, "attn_k": kv_dim, "attn_v": kv_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "attn_output.weight": (hidden, q_dim),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    shapes |= {f"{name}.weight": (size, hidden) for name, size in rows.items()}
    shapes |= {f"{name}.bias": (size,) for name, size in rows.items()}
    shapes |= {f"attn_{n}_norm.weight": (config["head_dim"],) for n in "qk"}
    interleaved = config["model_type"] in ("llama", "mistral")
    turned = {"attn_q": heads, "attn_k": kv_heads} if interleaved else {}
    for layer in range(config["num_hidden_layers"]):
        entries += [
            _Entry(
                f"model.layers.{layer}.{name}",
                f"blk.{layer}.{stored}",
                shapes.get(stored, (hidden,)),
                turned.get(stored.rpartition(".")[0], 0),
            )
            for stored, name in names.items()
        ]
    for entry in entries:
        tensor = source.tensors.get(entry.source)
        if tensor is None:
            raise UserError(f"{source.path} lacks tensor {entry.source}; use a complete model file")
        if tensor.shape != entry.shape:
            raise UserError(
                f"{source.path}: tensor {entry.source} has shape {tensor.shape}, expected "
                f"{entry.shape}; download the file again"
            )
    surplus = source.tensors.keys() - {e.source for e in entries} - {"rope_freqs.weight"}
    if surplus:
        raise UserError(
            f"{source.path} holds tensor {min(surplus)}, which architecture "
            f"{config['model_type']} does not have; choose another model"
        )
    return entries


def _published_rows(tensor: GgufTensor, heads: int) -> np.ndarray:
    """Rows of a projection in the published order: uint8 [rows, bytes per row].

    Rows are stored per head as 0, half, 1, half + 1, ...; quantisation blocks lie within a row, so
    the order is mended before dequantising.
    """
    if not heads:
        return tensor.rows
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    count, width = rows.shape
    pairs = rows.reshape(heads, count // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(tensor.rows.shape)


def _arrays(source: GgufFile, entries: list[_Entry]) -> Iterator[memoryview]:
    for entry in entries:
        tensor = source.tensors[entry.source]
        rows = _published_rows(tensor, entry.heads)
        values = to_float(tensor, rows)
        # A sum is one pass without a temporary; only if it is not finite is the cause looked for.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.sum(values, dtype=np.float32 if values.itemsize > 2 else np.float64))
        if not math.isfinite(total) and not np.isfinite(values).all():
            raise UserError(
                f"{source.path}: tensor {entry.source} holds NaN or infinity; download it again"
            )
        out = rows if tensor.type_name == "BF16" else values
        yield np.ascontiguousarray(out).reshape(-1).view(np.uint8).data


def _write_safetensors(path: Path, source: GgufFile, entries: list[_Entry]) -> None:
    """Streams the tensors into one file: u64 header length, JSON header, bytes in header order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The format asks for aligned tensors: the wider type goes first.
    kinds = {
        e.name: _SAFETENSORS_TYPES.get(source.tensors[e.source].type_name, "F32") for e in entries
    }
    entries = sorted(entries, key=lambda e: kinds[e.name] != "F32")
    at = 0
    for entry in entries:
        size = math.prod(entry.shape) * (4 if kinds[entry.name] == "F32" else 2)
        header[entry.name] = {
            "dtype": kinds[entry.name],
            "shape": list(entry.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _arrays(source, entries):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
