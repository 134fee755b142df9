"""Decoder weights in Hugging Face's folder layout: safetensors, in one file or in shards.

Files store a linear map as [out, in], one tensor a layer; the base pytree stores it as [in, out]
with the layers stacked. Nothing else differs, so reading what was written gives the same bits.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedjax_llm.errors import UserError
from fedjax_llm.models.config import DecoderConfig
from fedjax_llm.models.decoder import Base, base_shapes
from fedjax_llm.models.quantised import Quantised, any_quantised

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
# Module of the base pytree to module of the file, inside one layer.
_LAYER_MODULES = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def layer_module(name: str) -> str:
    """The file's name of a module inside a layer: "q_proj" is "self_attn.q_proj"."""
    return _LAYER_MODULES[name]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: The file is missing, is not JSON or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the folder of a Hugging Face model") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object under a temporary name and renames it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class TensorFiles:
    """The tensors of one or more safetensors files, memory-mapped and read by name."""

    def __init__(self, paths: Mapping[str, Path]):
        """Opens the files; ``paths`` gives the file of each tensor, or {"": path} for one file."""
        self._files: dict[Path, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(set(paths.values())):
            try:
                self._files[path] = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise UserError(f"{path} is missing; download the model again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); download it again") from None
            for name in self._files[path].keys():  # noqa: SIM118 (not a dict)
                self._paths[name] = path
        for name, path in paths.items():
            if name and self._paths.get(name) != path:
                raise UserError(f"{path} lacks tensor {name}; download the model again")

    @property
    def names(self) -> frozenset[str]:
        """All tensor names found in the files."""
        return frozenset(self._paths)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[name]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor.

        Raises:
          UserError: A shape other than asked for, a type that is not floating point, or a value
            that is not finite.
        """
        path, file = self._paths[name], self._files[self._paths[name]]
        header = file.get_slice(name)
        found, kind = tuple(header.get_shape()), header.get_dtype()
        if found != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {found}, config.json means {shape}; "
                "the two belong to different models"
            )
        if kind not in _FLOATS:
            raise UserError(
                f"{path}: tensor {name} has type {kind}, supported: {', '.join(_FLOATS)}; "
                "use the unquantised model of the same name"
            )
        tensor = file.get_tensor(name)
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{path}: tensor {name} holds NaN or infinite values; download the model again"
            )
        return tensor


def read_base(
    folder: Path | str,
    config: DecoderConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    quantise: Callable[[jax.Array], Quantised] | None = None,
) -> Base:
    """Reads the weights of a folder into the base pytree, one tensor at a time.

    Args:
      folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
      config: Of this model.
      dtype: Of the arrays; float32 represents all of float16 and bfloat16 exactly.
      quantise: What the kernel of each layer becomes, float32 [D, F]; one layer is in floats at a
        time. None keeps them as arrays.

    Raises:
      UserError: A missing or damaged file; a tensor that is missing, unexpected, of the wrong
        shape or not finite. The message names the file and the tensor.
    """
    folder = Path(folder)
    files = TensorFiles(_weight_map(folder))
    expected = {name for names in _file_names(config).values() for name in names}
    _check_names(folder, config, files, expected)

    def read(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array | Quantised:
        names, transposed = _file_names(config)[path], path[-1] == "kernel"
        stacked = path[0] == "layers"
        shape = leaf.shape[1:] if stacked else leaf.shape
        if transposed and quantise is not None:
            layers = (files.read(name, shape[::-1]).T.astype(np.float32) for name in names)
            kernels = [quantise(jnp.asarray(layer)) for layer in layers]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
        result = np.empty((len(names), *shape), dtype)
        for layer, name in enumerate(names):
            tensor = files.read(name, shape[::-1] if transposed else shape)
            result[layer] = (tensor.T if transposed else tensor).astype(dtype)
        return jnp.asarray(result if stacked else result[0])

    return _map_with_path(read, base_shapes(config))


def write_base(
    folder: Path | str, config: DecoderConfig, base: Base, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes ``config.json`` and the weights, in the dtype of the base, into a folder.

    A base larger than ``max_shard_bytes`` is written in shards with an index. ``config.json`` is
    written last, so a folder that has one is whole.

    Raises:
      UserError: The folder already holds weights, or a kernel is quantised, which the layout has no
        place for.
    """
    folder = Path(folder)
    if any_quantised(base):
        raise UserError(
            "the base has quantised kernels, which the file format does not hold; write "
            "models.dequantised_base(base)"
        )
    if folder.is_dir() and any(folder.glob("model*.safetensors*")):
        raise UserError(f"{folder} already holds a model; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(_tensors(config, base), max_shard_bytes))
    if len(shards) == 1:
        files = [SINGLE_FILE]
    else:
        files = [
            f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: _tensor(base, path, layer) for name, (path, layer) in names.items()}
        temporary = folder / f"{file}.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / file)
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    kind = jnp.dtype(base["embed"].dtype).name
    write_json(folder / CONFIG_FILE, config.to_hf() | {"torch_dtype": kind})


def _file_names(config: DecoderConfig) -> dict[tuple[str, ...], list[str]]:
    """For each leaf of the base its tensors in the files, one a layer where layers are stacked."""
    result: dict[tuple[str, ...], list[str]] = {
        ("embed",): ["model.embed_tokens.weight"],
        ("norm", "weight"): ["model.norm.weight"],
    }
    if not config.tie_embeddings:
        result["unembed",] = ["lm_head.weight"]
    for module, leaves in base_shapes(config)["layers"].items():
        for leaf in leaves:
            suffix = "bias" if leaf == "bias" else "weight"
            result["layers", module, leaf] = [
                f"model.layers.{layer}.{_LAYER_MODULES[module]}.{suffix}"
                for layer in range(config.num_layers)
            ]
    return result


def _weight_map(folder: Path) -> dict[str, Path]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.exists() or not index.exists():
        return {"": single}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lacks a weight_map; download the model again")
    for file in set(weight_map.values()):
        # An index is data from elsewhere: it must not name files outside its folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names the file {file!r}, not a plain name; do not use it")
    return {name: folder / file for name, file in weight_map.items()}


def _check_names(
    folder: Path, config: DecoderConfig, files: TensorFiles, expected: set[str]
) -> None:
    missing = sorted(expected - files.names)
    if missing:
        raise UserError(
            f"{folder} lacks tensor {missing[0]} ({len(missing)} missing in all); "
            "download the model again, or mend config.json"
        )
    # Old Llama files carry the rotary frequencies, which config.json determines.
    extra = {name for name in files.names - expected if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in extra:
        shape = (config.vocab_size, config.hidden_size)
        same = np.array_equal(
            files.read("lm_head.weight", shape), files.read("model.embed_tokens.weight", shape)
        )
        if not same:
            raise UserError(
                f"{files.path('lm_head.weight')}: tensor lm_head.weight differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false in config.json"
            )
        extra.remove("lm_head.weight")
    if extra:
        name = min(extra)
        raise UserError(
            f"{files.path(name)} holds the unexpected tensor {name} ({len(extra)} in all); "
            "config.json belongs to another model"
        )


def _map_with_path(function: Any, tree: Base, path: tuple[str, ...] = ()) -> Base:
    return {
        key: _map_with_path(function, value, (*path, key))
        if isinstance(value, dict)
        else function((*path, key), value)
        for key, value in tree.items()
    }


type _Place = tuple[tuple[str, ...], int | None]
"""Path of a leaf of the base, and the layer within it (None where layers are not stacked)."""


def _leaf(base: Base, path: tuple[str, ...]) -> jax.Array:
    value: Any = base
    for key in path:
        value = value[key]
    return value


def _tensors(config: DecoderConfig, base: Base) -> Iterator[tuple[str, _Place, int]]:
    """Name, place and bytes of each tensor, layer by layer as readers use them."""
    for path, names in _file_names(config).items():
        leaf = _leaf(base, path)
        for layer, name in enumerate(names):
            place = (path, layer if path[0] == "layers" else None)
            yield name, place, leaf.nbytes // len(names)


def _shards(
    tensors: Iterator[tuple[str, _Place, int]], max_shard_bytes: int
) -> Iterator[dict[str, _Place]]:
    shard: dict[str, _Place] = {}
    size = 0
    for name, place, bytes_ in tensors:
        if shard and size + bytes_ > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = place
        size += bytes_
    yield shard


def _tensor(base: Base, path: tuple[str, ...], layer: int | None) -> np.ndarray:
    leaf = _leaf(base, path)
    tensor = np.asarray(leaf if layer is None else leaf[layer])
    return np.ascontiguousarray(tensor.T if path[-1] == "kernel" else tensor)
