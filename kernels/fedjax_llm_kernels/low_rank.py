"""The product of activations with a low-rank matrix, which is never formed."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm_kernels.metered import Metered, metered_matmul

type Factors = tuple[jax.Array | Metered, jax.Array | Metered]


def low_rank_matmul(
    x_NxD: jax.Array,
    a_DxR: jax.Array | Metered,
    b_RxF: jax.Array | Metered,
    scale: float | jax.Array,
) -> jax.Array:
    """Computes ``scale * (x @ a) @ b`` in ``2 N R (D + F)`` flops instead of ``2 N D F``.

    Nothing here knows about clients. One adapter for each of K clients is ``jax.vmap`` over
    ``(x, a, b)``: XLA then runs two matrix products batched over K, whose cost does not depend on
    whether the clients share the frozen weight that this product is added to. ``jax.vmap`` over
    ``x`` alone (the examples of one client) merges the examples into the rows of one product; the
    derivatives of ``a`` and ``b`` are then formed for each example and added, so that who wants
    the sum alone is faster with the examples among the leading dimensions of ``x``.

    Differentiable in ``x``, ``a`` and ``b``, in reverse mode. The derivative is written out: the
    automatic one asks for the cotangent transposed, positions last, and XLA copies it, F numbers a
    position. On a CPU that copy is 11 to 18 percent of a training step of a 15M-parameter model.
    A factor may be ``Metered``: then the norms of the examples' gradients can be read off (see
    ``metered_matmul``).

    Args:
      x_NxD: Activations; any number of leading dimensions.
      a_DxR: Down-projection, of the same dtype as ``x``.
      b_RxF: Up-projection, of the same dtype as ``x``.
      scale: Multiplies the product; alpha / rank in LoRA (arXiv 2106.09685, section 4.1).

    Returns:
      An array of the shape of ``x`` with the last dimension F, of the dtype of ``x``.

    >>> x, a, b = jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones((1, 4))
    >>> low_rank_matmul(x, a, b, 0.5).tolist()
    [[1.5, 1.5, 1.5, 1.5], [1.5, 1.5, 1.5, 1.5]]
    """
    return low_rank_matmuls(x_NxD, [(a_DxR, b_RxF)], scale)[0]


def low_rank_matmuls(
    x_NxD: jax.Array, factors: Sequence[Factors], scale: float | jax.Array
) -> list[jax.Array]:
    """``low_rank_matmul`` of the same activations with several pairs of factors.

    The ranks stand side by side in three products that would otherwise be as many as there are
    pairs, each of a few columns: ``x @ a``, and the derivatives of ``x`` and of ``a``.

    Args:
      x_NxD: Activations; any number of leading dimensions.
      factors: Pairs (a [D, R], b [R, F]); R and F may differ from pair to pair.
      scale: Multiplies every product.

    Returns:
      One array for each pair.
    """
    found: dict[int, jax.Array] = {}
    plain: list[tuple[int, jax.Array, jax.Array]] = []
    for place, (a, b) in enumerate(factors):
        if isinstance(a, Metered) or isinstance(b, Metered):
            found[place] = metered_matmul(x_NxD, a, b, scale)
        else:
            plain.append((place, a, b))
    if plain:
        places, sides_a, sides_b = zip(*plain, strict=True)
        found |= zip(places, _products(x_NxD, sides_a, sides_b, scale), strict=True)
    return [found[place] for place in range(len(factors))]


type _Sides = tuple[jax.Array, ...]


@jax.custom_vjp
def _products(
    x_NxD: jax.Array, a_DxR: _Sides, b_RxF: _Sides, scale: float | jax.Array
) -> tuple[jax.Array, ...]:
    return _forward(x_NxD, a_DxR, b_RxF, scale)[0]


def _forward(
    x_NxD: jax.Array, a_DxR: _Sides, b_RxF: _Sides, scale: float | jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | _Sides, ...]]:
    scale = jnp.asarray(scale)
    down_NxR = x_NxD @ jnp.concatenate(a_DxR, axis=-1)
    # The scale goes on the factor: it has no positions.
    found = tuple(
        down @ (b * scale.astype(b.dtype))
        for down, b in zip(_split(down_NxR, a_DxR), b_RxF, strict=True)
    )
    return found, (x_NxD, down_NxR, a_DxR, b_RxF, scale)


def _backward(
    saved: tuple[jax.Array, jax.Array, _Sides, _Sides, jax.Array], dy_NxF: tuple[jax.Array, ...]
) -> tuple[jax.Array, _Sides, _Sides, jax.Array]:
    x_NxD, down_NxR, a_DxR, b_RxF, scale = saved
    # A constant arrives as the number that it is.
    by = jnp.asarray(scale, x_NxD.dtype)
    u_NxR = jnp.concatenate([dy @ (b * by).T for dy, b in zip(dy_NxF, b_RxF, strict=True)], axis=-1)
    # On a CPU the product with few rows is up to nine times as fast as the one with few columns.
    da_DxR = _split(_outer_sum(u_NxR, x_NxD).T, a_DxR)
    unscaled_RxF = [
        _outer_sum(down, dy) for down, dy in zip(_split(down_NxR, a_DxR), dy_NxF, strict=True)
    ]
    dscale = sum(
        jnp.sum(b * db, dtype=jnp.float32) for b, db in zip(b_RxF, unscaled_RxF, strict=True)
    )
    dx_NxD = u_NxR @ jnp.concatenate(a_DxR, axis=-1).T
    return (
        dx_NxD,
        tuple(da_DxR),
        tuple(db * by for db in unscaled_RxF),
        jnp.asarray(dscale).astype(jnp.result_type(scale)),
    )


def _split(along_R: jax.Array, sides: _Sides) -> list[jax.Array]:
    """The columns of each pair."""
    ends = [0]
    for side in sides:
        ends.append(ends[-1] + side.shape[-1])
    return [along_R[..., start:end] for start, end in itertools.pairwise(ends)]


def _outer_sum(x_NxP: jax.Array, u_NxQ: jax.Array) -> jax.Array:
    """Sum over all positions of the outer products, [P, Q]."""
    x_NxP, u_NxQ = (array.reshape(-1, array.shape[-1]) for array in (x_NxP, u_NxQ))
    return jnp.einsum("np,nq->pq", x_NxP, u_NxQ)


_products.defvjp(_forward, _backward)
