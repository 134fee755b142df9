"""The product of activations with a low-rank matrix, which is never formed."""

from collections.abc import Sequence

import jax

from fedjax_llm_kernels import choice, low_rank_clients, low_rank_xla
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
    whether the clients share the frozen weight that this product is added to. Where the table of
    ``choice`` says so for the device kind, one kernel takes their place (``low_rank_clients``); the
    table is asked while tracing, and where it names XLA nothing else is traced. ``jax.vmap`` over
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

    >>> import jax.numpy as jnp
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
        products = low_rank_xla.products
        if choice.of("many_adapters", None) == "pallas":
            products = low_rank_clients.products
        found |= zip(places, products(x_NxD, sides_a, sides_b, scale), strict=True)
    return [found[place] for place in range(len(factors))]
