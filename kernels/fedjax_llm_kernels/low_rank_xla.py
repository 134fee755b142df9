"""Low-rank products and their derivatives, written out in plain JAX.

What `low_rank` runs unless a kernel is the faster; its documentation says why they are as they are.

Letters: N positions, any number of leading dimensions; D inputs, R rank, F outputs.
"""

import itertools

import jax
import jax.numpy as jnp

type Sides = tuple[jax.Array, ...]
type Saved = tuple[jax.Array, jax.Array, Sides, Sides, jax.Array]


@jax.custom_vjp
def products(x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: float | jax.Array) -> Sides:
    """``scale * (x @ a) @ b`` for each pair (a, b); differentiable once, in reverse mode."""
    return forward(x_NxD, a_DxR, b_RxF, scale)[0]


def forward(
    x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: float | jax.Array
) -> tuple[Sides, Saved]:
    """The products, and what `backward` needs of them."""
    scale = jnp.asarray(scale)
    down_NxR = x_NxD @ jnp.concatenate(a_DxR, axis=-1)
    # The scale goes on the factor: it has no positions.
    found = tuple(
        down @ (b * scale.astype(b.dtype))
        for down, b in zip(split(down_NxR, a_DxR), b_RxF, strict=True)
    )
    return found, (x_NxD, down_NxR, a_DxR, b_RxF, scale)


def backward(saved: Saved, dy_NxF: Sides) -> tuple[jax.Array, Sides, Sides, jax.Array]:
    """Cotangents of x, a, b and scale, each of its dtype."""
    x_NxD, down_NxR, a_DxR, b_RxF, scale = saved
    # A constant arrives as the number that it is.
    by = jnp.asarray(scale, x_NxD.dtype)
    u_NxR = jnp.concatenate([dy @ (b * by).T for dy, b in zip(dy_NxF, b_RxF, strict=True)], axis=-1)
    # On a CPU the product with few rows is up to nine times as fast as the one with few columns,
    # which XLA would make of it and the transposition if it saw both.
    da_RxD = jax.lax.optimization_barrier(_outer_sum(u_NxR, x_NxD))
    da_DxR = split(da_RxD.T, a_DxR)
    unscaled_RxF = [
        _outer_sum(down, dy) for down, dy in zip(split(down_NxR, a_DxR), dy_NxF, strict=True)
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


products.defvjp(forward, backward)


def places(a_DxR: Sides) -> list[tuple[int, int]]:
    """Where the ranks of each pair start and end, when all stand side by side."""
    ends = itertools.accumulate((a.shape[-1] for a in a_DxR), initial=0)
    return list(itertools.pairwise(ends))


def split(along_R: jax.Array, a_DxR: Sides) -> list[jax.Array]:
    """The columns of each pair."""
    return [along_R[..., start:end] for start, end in places(a_DxR)]


def _outer_sum(x_NxP: jax.Array, u_NxQ: jax.Array) -> jax.Array:
    """Sum over all positions of the outer products, [P, Q]."""
    x_NxP, u_NxQ = (array.reshape(-1, array.shape[-1]) for array in (x_NxP, u_NxQ))
    return jnp.einsum("np,nq->pq", x_NxP, u_NxQ)
