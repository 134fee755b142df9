"""The dense form of an adapter."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_llm.lora.adapter import Adapter
from fedjax_llm.models.decoder import Base


def delta(adapter: Adapter) -> dict[str, jax.Array]:
    """What the adapter adds to each projection: float32 [L, D, F] by name."""
    return {
        name: jnp.einsum("ldr,lrf->ldf", a_LxDxR, b_LxRxF) * jnp.float32(adapter.scale)
        for name, (a_LxDxR, b_LxRxF) in adapter.factors.items()
    }


def add_dense(base: Base, added: Mapping[str, jax.Array]) -> Base:
    """A copy of the base with dense matrices added to kernels; other leaves are shared.

    The sum is taken in float32 and rounded once to the base's dtype.

    Args:
        base: frozen weights.
        added: float32 [L, D, F] by projection.
    """
    layers = dict(base["layers"])
    for name, added_LxDxF in added.items():
        kernel_LxDxF = layers[name]["kernel"]
        total_LxDxF = kernel_LxDxF.astype(jnp.float32) + added_LxDxF
        layers[name] = layers[name] | {"kernel": total_LxDxF.astype(kernel_LxDxF.dtype)}
    return base | {"layers": layers}


def merge(base: Base, adapter: Adapter) -> Base:
    """A copy of the base with the adapter added in, as `add_dense` does."""
    return add_dense(base, delta(adapter))
