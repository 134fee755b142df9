"""The dense form of an adapter."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_llm.lora.adapter import Adapter
from fedjax_llm.models.decoder import Base
from fedjax_llm.models.quantised import Added, Quantised


def delta(adapter: Adapter) -> dict[str, jax.Array]:
    """What the adapter adds to each projection: float32 [L, D, F] by name."""
    return {
        name: jnp.einsum("ldr,lrf->ldf", a_LxDxR, b_LxRxF) * jnp.float32(adapter.scale)
        for name, (a_LxDxR, b_LxRxF) in adapter.factors.items()
    }


def add_dense(base: Base, added: Mapping[str, jax.Array]) -> Base:
    """A copy of the base with dense matrices added to kernels; other leaves are shared.

    The sum is taken in float32 and rounded once to the base's dtype. To a quantised kernel it is
    only put beside: rounding the sum again would lose what small updates add.

    Args:
        base: frozen weights.
        added: float32 [L, D, F] by projection.
    """
    layers = dict(base["layers"])
    for name, added_LxDxF in added.items():
        kernel = layers[name]["kernel"]
        if isinstance(kernel, Added):
            total = Added(kernel.frozen, kernel.added_DxF + added_LxDxF)
        elif isinstance(kernel, Quantised):
            total = Added(kernel, added_LxDxF)
        else:
            total = (kernel.astype(jnp.float32) + added_LxDxF).astype(kernel.dtype)
        layers[name] = layers[name] | {"kernel": total}
    return base | {"layers": layers}


def merge(base: Base, adapter: Adapter) -> Base:
    """A copy of the base with the adapter added in, as `add_dense` does."""
    return add_dense(base, delta(adapter))
