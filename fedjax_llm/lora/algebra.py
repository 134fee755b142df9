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

# Added to a Gram matrix of unit diagonal; above the rounding errors of float32 sums.
_SHIFT = 2e-6
# The least pivot of a Gram matrix for the last pass of Cholesky QR, and the most passes.
_LAST_PASS = 0.3
_PASSES = 8
# The least pivot of rows whose singular values one Cholesky factor gives.
_ONE_TURN = 0.02
# Vectors shorter than that, of the longest, count as zero: their squares leave float32's range.
_SHORTEST = 1e-15


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix product over the last two axes, in full float32 precision.

    It stands between barriers: what is done to its operands and its result is then compiled alike
    in every program that does it, so that a plain round and an encrypted one end in the same bytes.
    """
    x, y = jax.lax.optimization_barrier((x, y))
    return jax.lax.optimization_barrier(jnp.matmul(x, y, precision=_PRECISION))


def matmul_tn(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x' @ y``, as `matmul`; x is read as it lies, not written transposed before the barrier."""
    x, y = jax.lax.optimization_barrier((x, y))
    return jax.lax.optimization_barrier(jnp.matmul(transposed(x), y, precision=_PRECISION))


def matmul_nt(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y'``, as `matmul`; y is read as it lies."""
    x, y = jax.lax.optimization_barrier((x, y))
    return jax.lax.optimization_barrier(jnp.matmul(x, transposed(y), precision=_PRECISION))


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


@jax.jit
def orthonormal(a_DxN: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns, [..., D, min(D, N)]; for any rank, zero included.

    By shifted Cholesky QR (arXiv 1809.11085): products with N x N matrices, which a processor does
    ten times faster than Householder's reflections of tall matrices. A pass of it shortens what
    is long and leaves what is short, so that a handful of passes even out any condition; the
    last one, of a well-conditioned matrix, is exact. Columns that depend on each other to the last
    bit go to Householder's.
    """
    inputs, inner = a_DxN.shape[-2:]
    if inner > inputs:
        return jnp.linalg.qr(a_DxN)[0]

    a_DxN, _ = _scaled(a_DxN)

    def step(a_DxN: jax.Array, gram_NxN: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, inverse_Nx1, lower_NxN = _cholesky_of_directions(gram_NxN, _SHIFT)
        a_DxN = matmul(a_DxN, inverse_Nx1 * _inverse_transposed(lower_NxN))
        return a_DxN, matmul_tn(a_DxN, a_DxN)

    def sound(gram_NxN: jax.Array) -> jax.Array:
        return _least_pivot(jnp.linalg.cholesky(gram_NxN)) > _LAST_PASS  # not where it is NaN

    start = (step(a_DxN, matmul_tn(a_DxN, a_DxN)), jnp.int32(1))
    (near_DxN, gram_NxN), _ = jax.lax.while_loop(
        lambda state: ~sound(state[0][1]) & (state[1] < _PASSES),
        lambda state: (step(*state[0]), state[1] + 1),
        start,
    )
    return jax.lax.cond(
        sound(gram_NxN),
        lambda: matmul(near_DxN, _inverse_transposed(jnp.linalg.cholesky(gram_NxN))),
        lambda: jnp.linalg.qr(a_DxN)[0],
    )


@jax.jit
def left_axes(b_NxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The left singular vectors [..., N, N] and singular values [..., N], longest first.

    A Gram matrix has half of float32's digits of what is short, but all of them once its rows are
    nearly orthogonal, of whatever lengths, and each is scaled to length one (Demmel and Veselic,
    SIAM J. Matrix Anal. 13, 1992). Rows that are not are turned to its eigenvectors first.
    """
    if b_NxF.shape[-2] > b_NxF.shape[-1]:
        u_NxN, s_F, _ = jnp.linalg.svd(b_NxF)
        return u_NxN, _widened(s_F, b_NxF.shape[-2] - b_NxF.shape[-1], -1)
    b_NxF, size = _scaled(b_NxF)
    gram_NxN = matmul_nt(b_NxF, b_NxF)
    _, _, lower_NxN = _cholesky_of_directions(gram_NxN, _SHIFT)

    def as_it_is() -> tuple[jax.Array, jax.Array]:
        length_Nx1, _, lower_NxN = _cholesky_of_directions(gram_NxN, 0.0)
        return _identity_like(gram_NxN), length_Nx1 * lower_NxN

    def turned() -> tuple[jax.Array, jax.Array]:
        turn_NxN = _eigenvectors(gram_NxN)
        turned_NxF = matmul_tn(turn_NxN, b_NxF)
        gram_of_turned_NxN = matmul_nt(turned_NxF, turned_NxF)
        # Rows of zeros may be among them, so that it needs the shift, a millionth here.
        length_Nx1, _, lower_NxN = _cholesky_of_directions(gram_of_turned_NxN, _SHIFT)
        return turn_NxN, length_Nx1 * lower_NxN

    def by_householder() -> tuple[jax.Array, jax.Array]:
        upper_NxN = jnp.linalg.qr(transposed(b_NxF), mode="r")
        return _identity_like(gram_NxN), transposed(upper_NxN)

    turn_NxN, factor_NxN = jax.lax.cond(_least_pivot(lower_NxN) > _ONE_TURN, as_it_is, turned)
    turn_NxN, factor_NxN = jax.lax.cond(
        jnp.isfinite(factor_NxN).all(), lambda: (turn_NxN, factor_NxN), by_householder
    )
    u_NxN, s_N, _ = jnp.linalg.svd(factor_NxN)
    return matmul(turn_NxN, u_NxN), s_N * size[..., 0]


def truncated(a_DxN: jax.Array, b_NxF: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best approximation of ``a @ b`` of a rank, by two QR factorisations and a small SVD.

    Returns:
        a_DxR with orthonormal columns and b_RxF with orthogonal rows, longest first: the leading
        R' < R columns and rows are the best approximation of rank R'.
    """
    q_DxN, left_NxN = jnp.linalg.qr(a_DxN)
    p_FxN, right_NxN = jnp.linalg.qr(transposed(b_NxF))
    u, s, vt = jnp.linalg.svd(matmul_nt(left_NxN, right_NxN), full_matrices=False)
    short = rank - s.shape[-1]
    if short > 0:
        # A matrix smaller than the rank: what is missing is zero.
        u, s = _widened(u, short, -1), _widened(s, short, -1)
        vt = _widened(vt, short, -2)
    a_DxR = matmul(q_DxN, u[..., :rank])
    b_RxF = matmul_nt(s[..., :rank, None] * vt[..., :rank, :], p_FxN)
    return a_DxR, b_RxF


def principal_axes(a_DxR: jax.Array, b_RxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewrites ``a @ b``, where a has orthonormal columns, as its singular value decomposition.

    The new a has orthonormal columns, the left singular vectors, and the new b is the singular
    values times the right ones, longest first. The product is the same up to rounding, whatever
    the eigenvectors' own accuracy, because they enter as a rotation. Only R x R matrices are
    decomposed.
    """
    u_RxR = _eigenvectors(matmul_nt(b_RxF, b_RxF))
    return _reorthonormalised(matmul(a_DxR, u_RxR)), matmul_tn(u_RxR, b_RxF)


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
    gram_RxR = matmul_tn(a_DxR, a_DxR)
    identity = _identity_like(gram_RxR)
    return matmul(a_DxR, jnp.float32(1.5) * identity - jnp.float32(0.5) * gram_RxR)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each matrix times one over its largest entry, and that; so that squares stay in range."""
    size = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    size = jnp.where(size >= jnp.finfo(jnp.float32).tiny, size, jnp.float32(1))
    return x * jax.lax.optimization_barrier(1 / size), size


def _eigenvectors(gram_NxN: jax.Array) -> jax.Array:
    """Of a Gram matrix, those of the largest eigenvalues first."""
    _, u_NxN = jnp.linalg.eigh(_scaled(gram_NxN)[0])
    return jnp.flip(u_NxN, axis=-1)  # eigenvalues come in ascending order


def _cholesky_of_directions(
    gram_NxN: jax.Array, shift: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors' lengths, one over them (1 for zeros), and their Cholesky factor at length 1.

    Those shorter than `_SHORTEST` of the longest are zeros.

    Barriers, and no division by what is broadcast: XLA makes a product of that on two devices and
    not on one, with other bytes.
    """
    barrier = jax.lax.optimization_barrier
    squares_N = jnp.diagonal(gram_NxN, axis1=-2, axis2=-1)
    least_1 = jnp.max(squares_N, axis=-1, keepdims=True) * jnp.float32(_SHORTEST**2)
    length_N = barrier(jnp.sqrt(jnp.where(squares_N > least_1, squares_N, jnp.float32(0))))
    inverse_N = barrier(1 / jnp.where(length_N > 0, length_N, jnp.float32(1)))
    unit_NxN = barrier(gram_NxN * inverse_N[..., :, None] * inverse_N[..., None, :])
    shift_NxN = jnp.float32(shift) * _identity_like(gram_NxN)
    lower_NxN = jnp.linalg.cholesky(barrier(unit_NxN + shift_NxN))
    return length_N[..., :, None], inverse_N[..., :, None], lower_NxN


def _least_pivot(lower_NxN: jax.Array) -> jax.Array:
    return jnp.min(jnp.diagonal(lower_NxN, axis1=-2, axis2=-1))


def _inverse_transposed(lower_NxN: jax.Array) -> jax.Array:
    identity = _identity_like(lower_NxN)
    inverse_NxN = jax.lax.linalg.triangular_solve(lower_NxN, identity, left_side=True, lower=True)
    return transposed(inverse_NxN)


def _identity_like(x_NxN: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(x_NxN.shape[-1], dtype=x_NxN.dtype), x_NxN.shape)


def _widened(x: jax.Array, by: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, by)
    return jnp.pad(x, widths)
