"""The container format GGUF: metadata and memory-mapped tensors, with every length checked.

The `gguf` package reads the same format, but builds one array object for every token of a
vocabulary (seconds), and follows whatever lengths a damaged file states. Its tables of block sizes
and its dequantisation are used here.

Layout (little-endian): magic "GGUF", u32 version, u64 tensor count, u64 metadata count; metadata as
(string key, u32 type, value); tensors as (string name, u32 dimensions, u64 each, u32 type, u64
offset); padding to `general.alignment`; the tensors' bytes. A string is a u64 length and UTF-8.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_LARGEST_HEADER_COUNT = 1_000_000
_LONGEST_NAME = 128


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as stored.

    Attributes:
        name: GGUF name, such as `blk.0.attn_q.weight`.
        shape: outermost dimension first (the file stores it innermost first).
        type_name: ggml type, such as `F32` or `Q4_1`.
        rows: uint8 [rows, bytes per row], memory-mapped; a row is the innermost dimension.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    rows: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def scalar[T: (int, float, str, bool)](
    metadata: Mapping[str, Any], key: str, kind: type[T], default: T | None = None
) -> T:
    """One metadata value, checked to be of the kind that is needed.

    Raises:
        UserError: missing without a default, of another kind, or (numbers) not finite or negative.
    """
    value = metadata.get(key, default)
    if value is None:
        raise UserError(f"GGUF metadata {key} is missing; use a complete model file")
    # A bool is an int to Python, an int is a good float to everybody.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits and kind in (int, float):
        fits = math.isfinite(value) and value >= 0
    if not fits:
        raise UserError(
            f"GGUF metadata {key} is {repr(value)[:40]}, expected one {kind.__name__}; "
            "choose another file of this model"
        )
    return kind(value)


def items[T: (int, float, str)](
    metadata: Mapping[str, Any], key: str, kind: type[T], default: list[T] | None = None
) -> list[T]:
    """One metadata array, checked to hold items of one kind.

    Raises:
        UserError: missing without a default, no array, or with items of another kind.
    """
    value = metadata.get(key, default)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise UserError(
            f"GGUF metadata {key} is not a list of {kind.__name__}; use a complete model file"
        )
    return value


class _Truncated(Exception):
    pass


class _Reader:
    def __init__(self, data: np.ndarray) -> None:
        self.view = memoryview(data)
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.view) - self.at:
            raise _Truncated
        piece = self.view[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            # The shortest item takes eight bytes, so a false count is caught before it is followed.
            if count * 8 > len(self.view) - self.at:
                raise _Truncated
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata type {kind} is unknown")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()


def read_gguf(path: Path | str) -> GgufFile:
    """Reads the metadata and maps the tensors of a GGUF file (version 2 or 3, little-endian).

    Raises:
        UserError: missing, truncated, or not such a file.
    """
    path = Path(path)
    cure = "download the file again"
    try:
        if path.stat().st_size < 24:
            raise UserError(f"{path} is truncated ({path.stat().st_size} bytes); {cure}")
        data = np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the path of a GGUF file"
        ) from error
    try:
        return _parse(path, data)
    except _Truncated as error:
        raise UserError(f"{path} is truncated ({data.size} bytes); {cure}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid GGUF file: {error}; {cure}") from error


def _parse(path: Path, data: np.ndarray) -> GgufFile:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    reader = _Reader(data)
    if bytes(reader.take(4)) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} (or a big-endian file) is not supported")
    tensor_count, metadata_count = reader.number("<Q"), reader.number("<Q")
    if max(tensor_count, metadata_count) > _LARGEST_HEADER_COUNT:
        raise ValueError(f"it states {tensor_count} tensors and {metadata_count} metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    headers: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.number("<I")
        # Names are shown in errors, which are one line.
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f"a tensor is named {name[:_LONGEST_NAME]!r}")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
        headers.append((name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in headers:
        quantization = GGMLQuantizationType(kind)
        per_block, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape[-1] % per_block or min(shape) < 1:
            raise ValueError(f"tensor {name} has shape {shape}, not in blocks of {per_block}")
        if name in tensors:
            raise ValueError(f"tensor {name} occurs twice")
        row_bytes = shape[-1] // per_block * block_bytes
        rows = math.prod(shape[:-1])
        begin, end = start + offset, start + offset + rows * row_bytes
        if end > data.size:
            raise _Truncated
        stored = data[begin:end].reshape(rows, row_bytes)
        tensors[name] = GgufTensor(name, shape, quantization.name, stored)
    return GgufFile(path, metadata, tensors)


def to_float(tensor: GgufTensor, rows: np.ndarray | None = None) -> np.ndarray:
    """The values of a tensor: float16 where so stored, otherwise float32 (exact for bfloat16).

    Args:
        tensor: the tensor.
        rows: its rows in another order, uint8; as stored when None.

    Returns:
        Array of `tensor.shape`.

    Raises:
        UserError: a quantisation that the `gguf` package cannot undo.
    """
    rows = tensor.rows if rows is None else rows
    if tensor.type_name == "F16":
        return np.ascontiguousarray(rows).view("<f2").reshape(tensor.shape)
    if tensor.type_name == "F32":
        return np.ascontiguousarray(rows).view("<f4").reshape(tensor.shape)
    if tensor.type_name == "BF16":
        # bfloat16 is the upper half of a float32.
        upper = np.ascontiguousarray(rows).view("<u2").astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32).reshape(tensor.shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        # A block whose scale is not finite is for the caller to find in the values.
        with np.errstate(all="ignore"):
            values = dequantize(np.asarray(rows), GGMLQuantizationType[tensor.type_name])
    except NotImplementedError as error:
        raise UserError(
            f"tensor {tensor.name} is stored as {tensor.type_name}, which cannot be dequantised; "
            "use a Q4, Q5, Q6, Q8, F16 or F32 file of this model"
        ) from error
    return np.asarray(values, np.float32).reshape(tensor.shape)
