"""Arithmetic over the rows of those present; absent rows may hold anything.

Letters: K clients, P parameters.
"""

import jax
import jax.numpy as jnp

# The least normal float32: a divisor that is never zero, even where denormals are flushed.
TINY = float(jnp.finfo(jnp.float32).tiny)


def only(rows_KxP: jax.Array, chosen_K: jax.Array) -> jax.Array:
    """The rows, float32 [K, P], with zeros in place of those not chosen.

    Not a product with the mask: zero times NaN is NaN.
    """
    return jnp.where(chosen_K[:, None], rows_KxP.astype(jnp.float32), jnp.float32(0))


def count(chosen_K: jax.Array) -> jax.Array:
    """[] int32, how many are chosen."""
    return chosen_K.sum(dtype=jnp.int32)


def mean(rows_KxP: jax.Array, chosen_K: jax.Array) -> jax.Array:
    """[P] float32, the mean of the rows chosen, or zeros when there are none."""
    number = jnp.maximum(count(chosen_K), jnp.int32(1)).astype(jnp.float32)
    return only(rows_KxP, chosen_K).sum(axis=0) / number


def sorted_columns(rows_KxP: jax.Array, present_K: jax.Array) -> jax.Array:
    """[K, P] float32: each column in ascending order, +inf in the places of those absent."""
    rows_KxP = rows_KxP.astype(jnp.float32)
    return jnp.sort(jnp.where(present_K[:, None], rows_KxP, jnp.float32(jnp.inf)), axis=0)


def norms(rows_KxP: jax.Array) -> jax.Array:
    """[K] float32, the l2 norm of each row; inf from about 1.8e19."""
    return jnp.sqrt(jnp.square(rows_KxP).sum(axis=1))


def squared_distances(rows_KxP: jax.Array, present_K: jax.Array) -> jax.Array:
    """[K, K] float32: squared l2 distances; inf on the diagonal and to and from those absent.

    Rows are subtracted before they are squared. The shorter |x|^2 + |y|^2 - 2 <x, y> would lose
    the small distances between honest clients to cancellation (and to TF32 on a GPU) as soon as
    messages share a large part, and Krum compares exactly those. One row at a time: memory stays
    at K P.
    """
    rows_KxP = only(rows_KxP, present_K)
    squares_KxK = jax.lax.map(lambda row: jnp.square(rows_KxP - row[None]).sum(axis=1), rows_KxP)
    pairs_KxK = present_K[:, None] & present_K[None] & ~jnp.eye(present_K.shape[0], dtype=bool)
    return jnp.where(pairs_KxK, squares_KxK, jnp.float32(jnp.inf))
