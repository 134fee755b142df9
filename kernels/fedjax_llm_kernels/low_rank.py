"""The product of activations with a low-rank matrix, which is never formed."""

import jax
import jax.numpy as jnp


def low_rank_matmul(
    x_NxD: jax.Array, a_DxR: jax.Array, b_RxF: jax.Array, scale: float
) -> jax.Array:
    """Computes ``scale * (x @ a) @ b`` in ``2 N R (D + F)`` flops instead of ``2 N D F``.

    Nothing here knows about clients. One adapter for each of K clients is ``jax.vmap`` over
    ``(x, a, b)``: XLA then runs two matrix products batched over K, whose cost does not depend on
    whether the clients share the frozen weight that this product is added to. ``jax.vmap`` over
    ``x`` alone (the examples of one client) merges the examples into the rows of one product.

    Differentiable in ``x``, ``a`` and ``b``.

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
    # The scale goes on the narrow side: R numbers a row, not F.
    inner_NxR = (x_NxD @ a_DxR) * jnp.asarray(scale, x_NxD.dtype)
    return inner_NxR @ b_RxF
