"""The dense form of an adapter."""

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


def merge(base: Base, adapter: Adapter) -> Base:
    """A copy of the base with the adapter added in; leaves that do not change are shared.

    The sum is taken in float32 and rounded once to the base's dtype.
    """
    layers = dict(base["layers"])
    for name, delta_LxDxF in delta(adapter).items():
        kernel_LxDxF = layers[name]["kernel"]
        total_LxDxF = kernel_LxDxF.astype(jnp.float32) + delta_LxDxF
        layers[name] = layers[name] | {"kernel": total_LxDxF.astype(kernel_LxDxF.dtype)}
    return base | {"layers": layers}
