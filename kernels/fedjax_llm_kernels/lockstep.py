"""Loops and branches that go the same way on all devices that hold parts of one array.

To put the parts together all of them have to come to the same place, and as often; each has rows of
its own, whose loops have lengths of their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
DATA = "data"
"""The mesh axis along which arrays lie in parts."""


def in_step(turns: jax.Array) -> jax.Array:
    """The most turns that one of the devices takes that share the weights of this one.

    Args:
      turns: int32 scalar, of this device.

    Returns:
      int32; `turns` itself outside of programs in which several devices share weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA in mesh.manual_axes and mesh.shape[DATA] > 1:
        most: jax.Array = jax.lax.pmax(turns, DATA)
        return most
    return turns


def turns_together(
    turns: jax.Array, body: Callable[[jax.Array, PyTree], PyTree], start: PyTree
) -> PyTree:
    """As `jax.lax.fori_loop` from 0 to `turns`, for a body that uses the base.

    Devices that share weights take as many turns; those beyond a device's own leave no trace.
    """
    most = in_step(turns)
    if most is turns:
        return jax.lax.fori_loop(jnp.int32(0), turns, body, start)

    def kept(index: jax.Array, carry: PyTree) -> PyTree:
        after = body(index, carry)
        return jax.tree.map(lambda new, old: jnp.where(index < turns, new, old), after, carry)

    return jax.lax.fori_loop(jnp.int32(0), most, kept, start)
