"""The part of an adapter that a rule trains and sends, and what a smaller rank leaves of it.

A part is ``{projection: {side: array}}`` with the sides

| side | shape | what |
|---|---|---|
| `a` | [L, D, R] | down-projection |
| `b` | [L, R, F] | up-projection |
| `r` | [L, R, R] | between two fixed projections (Fed-SB) |
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fedjax_llm.lora import Adapter, LowRank

Side = Literal["a", "b", "r"]
Part = dict[str, dict[str, jax.Array]]

# The axes of a side that count the rank.
RANK_AXES: dict[str, tuple[int, ...]] = {"a": (2,), "b": (1,), "r": (1, 2)}


def pick(adapter: Adapter, sides: Sequence[Side]) -> Part:
    """The sides `a` and `b` of an adapter, those that are named."""
    arrays = {"a": "a_LxDxR", "b": "b_LxRxF"}
    return {
        name: {side: getattr(factor, arrays[side]) for side in sides}
        for name, factor in adapter.factors.items()
    }


def put(adapter: Adapter, part: Part) -> Adapter:
    """The adapter with the sides `a` and `b` of a part in place of its own."""
    factors = {}
    for name, factor in adapter.factors.items():
        sides = part[name]
        factors[name] = LowRank(sides.get("a", factor.a_LxDxR), sides.get("b", factor.b_LxRxF))
    return Adapter(factors=factors, scale=adapter.scale)


def subset(part: Part, sides: Sequence[Side]) -> Part:
    """The named sides of a part."""
    return {name: {side: part[name][side] for side in sides} for name in part}


def zip_with(function: Callable[..., jax.Array], *parts: Part) -> Part:
    """Applies a function to the arrays of parts of one structure."""
    return jax.tree.map(function, *parts)


def where_rank(part: Part, other: Part, rank: jax.Array) -> Part:
    """`part` in the coordinates of the first `rank` ranks, `other` beyond.

    Args:
        part: any sides.
        other: of the same structure.
        rank: int32 scalar, may be traced; at least R leaves `part` as it is.
    """

    def choose(side: str, new: jax.Array, old: jax.Array) -> jax.Array:
        inside = jnp.ones((1,) * new.ndim, bool)
        for axis in RANK_AXES[side]:
            shape = [1] * new.ndim
            shape[axis] = new.shape[axis]
            inside = inside & (jnp.arange(new.shape[axis]) < rank).reshape(shape)
        return jnp.where(inside, new, old)

    return {
        name: {side: choose(side, array, other[name][side]) for side, array in sides.items()}
        for name, sides in part.items()
    }


def size_at_rank(part: Part, rank: int | None = None) -> int:
    """Numbers in a part's arrays (or shapes), of its first `rank` ranks; of all if None."""
    total = 0
    for sides in part.values():
        for side, array in sides.items():
            count = 1
            for axis, length in enumerate(array.shape):
                kept = rank if rank is not None and axis in RANK_AXES[side] else length
                count *= min(kept, length)
            total += count
    return total
