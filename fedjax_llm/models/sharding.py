"""Where the weights of a decoder lie on a mesh: a partition of each leaf, by its name.

Axis `model` is tensor parallel (arXiv 1909.08053, section 3): the projections into heads and into
the feed-forward layer are cut by outputs, those back into the residual stream by inputs, so that a
layer adds up twice over the devices. Axis `data` cuts what is left of each matrix (FSDP, arXiv
2304.11277): a device holds a part and gathers the rest just before it is used. Embeddings are cut
by width along `model`, because the loss passes over the vocabulary in chunks, and by words along
`data`. Norms are on every device; they are a few thousand numbers.

| leaf | along `data` | along `model` |
|---|---|---|
| q_proj, k_proj, v_proj, gate_proj, up_proj: kernel [L, D, F] | D | F, whole heads |
| their bias [L, F] | | F |
| o_proj, down_proj: kernel [L, D, F] | F | D |
| embed, unembed [V, D] | V | D |
| norms | | |
| adapter: A [L, D, R] of o_proj and down_proj | | D |
| adapter: B [L, R, F] of the others | | F |
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fedjax_llm.errors import UserError
from fedjax_llm.models.config import DecoderConfig
from fedjax_llm.models.decoder import Base, base_shapes
from fedjax_llm.models.quantised import Quantised
from fedjax_llm_kernels.lockstep import DATA

MODEL = "model"
# Cut by inputs along `model`; the other projections by outputs.
BACK = ("o_proj", "down_proj")


def base_specs(config: DecoderConfig, data: int, model: int, base: Base | None = None) -> Base:
    """The partition of each array of a base, of the base's structure.

    Axes of size 1 are left out.

    Args:
      config: of the model.
      data: size of axis `data`.
      model: size of axis `model`.
      base: its weights, where kernels may be quantised; arrays of `base_shapes` if None. The codes
        of a quantised kernel are cut as the kernel is, and its scales where their sizes allow.

    Raises:
      UserError: an axis by which the weights cannot be cut evenly; with the sizes that can be.
    """
    check_sizes(config, data, model)
    sizes = {DATA: data, MODEL: model}

    def of_leaf(path: Sequence[Any], leaf: Any) -> Any:
        wanted = _wanted([key.key for key in path], config.vocab_size % data == 0)
        if not isinstance(leaf, Quantised):
            return _fitting(wanted, leaf.shape, sizes)
        specs = jax.tree.map(lambda part: _fitting(wanted, part.shape, sizes), leaf)
        codes = max(jax.tree.leaves(leaf), key=lambda part: part.size)
        for axis, size in zip(wanted, codes.shape, strict=True):
            if axis is not None and size % sizes[axis]:
                raise UserError(
                    f"[devices] mesh: {axis} = {sizes[axis]} does not divide the {size} rows of "
                    f"codes of {path[-2].key}; use a smaller one, or [model] weights in floats"
                )
        return specs

    found: Base = jax.tree_util.tree_map_with_path(
        of_leaf,
        base_shapes(config) if base is None else base,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )
    return found


def adapter_specs(names: Sequence[str]) -> dict[str, tuple[PartitionSpec, PartitionSpec]]:
    """The partitions of A [L, D, R] and B [L, R, F] by projection name.

    A device then computes the low-rank product of its own part of a projection, and the sum over
    devices that `o_proj` and `down_proj` need anyway takes it along.
    """
    whole = PartitionSpec()
    return {
        name: (PartitionSpec(None, MODEL), whole)
        if name in BACK
        else (whole, PartitionSpec(None, None, MODEL))
        for name in names
    }


def check_sizes(config: DecoderConfig, data: int, model: int) -> None:
    """Refuses axis sizes by which the weights cannot be cut evenly.

    Raises:
      UserError: one does not divide what it cuts; with the sizes that do.
    """
    width = ("width", config.hidden_size)
    heads, keys = ("heads", config.num_heads), ("key-value heads", config.num_kv_heads)
    _check(MODEL, model, (keys, heads, ("inner width", config.intermediate_size), width))
    _check(DATA, data, (width,))
    if config.vocab_size % data and config.hidden_size % (data * model):
        raise UserError(
            f"[devices] mesh: data = {data} divides neither the model's {config.vocab_size} words "
            f"nor, by {model} of model, its width {config.hidden_size}; use data = 1"
        )


def _wanted(names: Sequence[str], cut_by_words: bool) -> tuple[Any, ...]:
    """The axes of a leaf, by the names on the way to it."""
    if names[-1] in ("embed", "unembed"):
        return (DATA, MODEL) if cut_by_words else (None, (DATA, MODEL))
    module, kind = names[-2:]
    if kind == "kernel":
        return (None, MODEL, DATA) if module in BACK else (None, DATA, MODEL)
    if kind == "bias":
        return (None, MODEL)
    return (None,) * (2 if names[0] == "layers" else 1)


def _fitting(wanted: Sequence[Any], shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """Of the axes wanted, those with several devices that divide their dimension."""
    cuts = []
    for axes, size in zip(wanted, shape, strict=True):
        several = [axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis]
        several = [axis for axis in several if sizes[axis] > 1]
        divides = size % math.prod(sizes[axis] for axis in several) == 0
        cuts.append(tuple(several) if several and divides else None)
    return PartitionSpec(*(one if one is None or len(one) > 1 else one[0] for one in cuts))


def _check(axis: str, size: int, cut: Sequence[tuple[str, int]]) -> None:
    for what, number in cut:
        if number % size:
            common = math.gcd(*(own for _, own in cut))
            possible = [str(each) for each in range(1, common + 1) if common % each == 0]
            raise UserError(
                f"[devices] mesh: {axis} = {size} does not divide the model's {number} {what}; "
                f"use {', '.join(possible)}"
            )
