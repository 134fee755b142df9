"""A base model whose kernels are quantised: made, turned back into floats, and its bytes."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjax_llm.models.decoder import Base
from fedjax_llm.models.quantised import Int8, Quantised
from fedjax_llm.models.quantised_nf4 import NF4

Kind = Literal["int8", "nf4", "nf4-double"]

KINDS: dict[Kind, Callable[[jax.Array], Quantised]] = {
    "int8": jax.jit(Int8.of),
    "nf4": jax.jit(functools.partial(NF4.of, double=False)),
    "nf4-double": jax.jit(functools.partial(NF4.of, double=True)),
}
"""From the name of a kind to the function that quantises a kernel [..., D, F]."""


def quantised_base(base: Base, kind: Kind) -> Base:
    """A base with its layers' kernels quantised; embeddings, norms and biases stay, as in QLoRA.

    Args:
      base: float weights. To read a model without ever having it in floats, give `load_model` the
        kind.
      kind: one of `KINDS`.
    """

    def quantised(module: Any) -> Any:
        return module | {"kernel": KINDS[kind](module["kernel"])} if "kernel" in module else module

    return base | {"layers": {name: quantised(module) for name, module in base["layers"].items()}}


def dequantised_base(base: Base, dtype: jax.typing.DTypeLike = jnp.float32) -> Base:
    """The float model that a base stands for, its quantised kernels in a dtype; others as are."""
    return jax.tree.map(
        lambda leaf: leaf.dequantised().astype(dtype) if isinstance(leaf, Quantised) else leaf,
        base,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )


def base_bytes(base: Base) -> int:
    """Bytes of all arrays of a base."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(base))
