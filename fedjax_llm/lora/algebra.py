"""Sums of low-rank products, handled through their factors: no D x F matrix is ever formed.

A sum of K products A_k @ B_k is one product of the factors put side by side, [A_1 .. A_K] and
[B_1; ..; B_K], of inner size N. All functions take leading axes (layers) and cost O((D + F) N^2).

Letters: D inputs, F outputs, N inner size, R rank.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Matrix products in full float32: an accelerator would otherwise use fewer bits than the errors
# that are promised here.
_PRECISION = jax.lax.Precision.HIGHEST


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix product over the last two axes, in full float32 precision.

    It stands between barriers: what is done to its operands and its result is then compiled alike
    in every program that does it, so that a plain round and an encrypted one end in the same bytes.
    """
    x, y = jax.lax.optimization_barrier((x, y))
    return jax.lax.optimization_barrier(jnp.matmul(x, y, precision=_PRECISION))


def transposed(x: jax.Array) -> jax.Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def side_by_side(factors_KxLxDxR: jax.Array, weights_K: jax.Array) -> jax.Array:
    """Down-projections of K clients, each times its weight, as one: [L, D, K * R]."""
    clients, layers, inputs, rank = factors_KxLxDxR.shape
    weighted = factors_KxLxDxR * weights_K[:, None, None, None]
    return jnp.transpose(weighted, (1, 2, 0, 3)).reshape(layers, inputs, clients * rank)


def one_above_another(factors_KxLxRxF: jax.Array) -> jax.Array:
    """Up-projections of K clients as one: [L, K * R, F], in the order of `side_by_side`."""
    clients, layers, rank, outputs = factors_KxLxRxF.shape
    return jnp.transpose(factors_KxLxRxF, (1, 0, 2, 3)).reshape(layers, clients * rank, outputs)


def orthonormal(a_DxN: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns, [..., D, min(D, N)]; for any rank, zero included."""
    return jnp.linalg.qr(a_DxN)[0]


def truncated(a_DxN: jax.Array, b_NxF: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best approximation of ``a @ b`` of a rank, by two QR factorisations and a small SVD.

    Returns:
        a_DxR with orthonormal columns and b_RxF with orthogonal rows, longest first: the leading
        R' < R columns and rows are the best approximation of rank R'.
    """
    q_DxN, left_NxN = jnp.linalg.qr(a_DxN)
    p_FxN, right_NxN = jnp.linalg.qr(transposed(b_NxF))
    u, s, vt = jnp.linalg.svd(matmul(left_NxN, transposed(right_NxN)), full_matrices=False)
    short = rank - s.shape[-1]
    if short > 0:
        # A matrix smaller than the rank: what is missing is zero.
        u, s = _widened(u, short, -1), _widened(s, short, -1)
        vt = _widened(vt, short, -2)
    a_DxR = matmul(q_DxN, u[..., :rank])
    b_RxF = matmul(s[..., :rank, None] * vt[..., :rank, :], transposed(p_FxN))
    return a_DxR, b_RxF


def principal_axes(a_DxR: jax.Array, b_RxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewrites ``a @ b``, where a has orthonormal columns, as its singular value decomposition.

    The new a has orthonormal columns, the left singular vectors, and the new b is the singular
    values times the right ones, longest first. The product is the same up to rounding, whatever
    the eigenvectors' own accuracy, because they enter as a rotation. Only R x R matrices are
    decomposed.
    """
    gram_RxR = matmul(b_RxF, transposed(b_RxF))
    # Scaled so that squares neither overflow nor vanish; a zero matrix stays zero.
    size = jnp.max(jnp.abs(gram_RxR), axis=(-2, -1), keepdims=True)
    _, u_RxR = jnp.linalg.eigh(gram_RxR / jnp.where(size > 0, size, jnp.float32(1)))
    u_RxR = jnp.flip(u_RxR, axis=-1)  # eigenvalues come in ascending order
    return _reorthonormalised(matmul(a_DxR, u_RxR)), matmul(transposed(u_RxR), b_RxF)


def frobenius_of_sum(products: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The Frobenius norm of the sum of ``a @ b`` over pairs, over all leading axes together.

    The small triangular factors carry it, so that a difference of nearly equal products is exact
    to a few units of float32 of the products' size. Where the inner sizes add up to more than D or
    F, the sum itself is smaller than its factors and is formed, one layer at a time.

    Args:
        products: pairs of [L, D, N_i] and [L, N_i, F].
    """
    a_LxDxN = jnp.concatenate([a for a, _ in products], axis=-1)
    b_LxNxF = jnp.concatenate([b for _, b in products], axis=-2)

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        a_DxN, b_NxF = layer
        if a_DxN.shape[1] < min(a_DxN.shape[0], b_NxF.shape[1]):
            a_DxN = jnp.linalg.qr(a_DxN, mode="r")
            b_NxF = transposed(jnp.linalg.qr(transposed(b_NxF), mode="r"))
        return jnp.sum(jnp.square(matmul(a_DxN, b_NxF)))

    return jnp.sqrt(jnp.sum(jax.lax.map(of_layer, (a_LxDxN, b_LxNxF))))


def _reorthonormalised(a_DxR: jax.Array) -> jax.Array:
    """One Newton step towards the nearest orthonormal columns.

    A rotation every round lets rounding errors add up; this takes off what one round added.
    """
    rank = a_DxR.shape[-1]
    gram_RxR = matmul(transposed(a_DxR), a_DxR)
    identity = jnp.broadcast_to(jnp.eye(rank, dtype=a_DxR.dtype), gram_RxR.shape)
    return matmul(a_DxR, jnp.float32(1.5) * identity - jnp.float32(0.5) * gram_RxR)


def _widened(x: jax.Array, by: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, by)
    return jnp.pad(x, widths)
