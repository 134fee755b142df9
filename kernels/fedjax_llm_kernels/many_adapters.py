"""The low-rank products of many clients at once, each client with an adapter of its own.

`low_rank_xla.products` under `jax.vmap` is the XLA form: two batched products forward, five
backward, and between them R numbers a position that go to memory and come back. What it costs on an
accelerator is not the few products but the passes over x, y and their cotangents: the Pallas forms
(`many_adapters_pallas`) read x once and write y once forward, and read x and dy once and write dx
once backward, and the R numbers stay in the core.

For who has the clients' arrays at hand, as benchmarks have. A round has a model of one client under
`jax.vmap` instead, and comes to the same kernels by `low_rank`.

Letters: K clients, T positions, D inputs, R rank, F outputs.
"""

import jax

from . import choice, low_rank_clients, low_rank_xla
from .pallas_forms import Implementation


def many_adapter_matmul(
    x_KxTxD: jax.Array,
    a_KxDxR: jax.Array,
    b_KxRxF: jax.Array,
    scale: float | jax.Array,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``scale * (x[k] @ a[k]) @ b[k]`` for each client k.

    Differentiable once, in reverse mode, in all four. All products are added up in float32; the
    R numbers of a position are rounded to the dtype of ``x`` between the products, as XLA's are.
    The scale is rounded to that dtype too, and so is its product with ``b``.

    | case | result |
    |---|---|
    | a value of one client is not finite | no other client is affected |
    | K, T or F is 0 | an empty array; its gradients are zeros |

    Args:
      x_KxTxD: Activations, float32 or bfloat16.
      a_KxDxR: Down-projections, of the same dtype.
      b_KxRxF: Up-projections, of the same dtype.
      scale: One number for all; alpha / rank in LoRA (arXiv 2106.09685, section 4.1).
      implementation: "xla", "pallas", or None for what `choice` names for the device kind. The
        forms add in different orders: they agree up to rounding, not bit for bit. What a kernel
        cannot have has the XLA form by either name: see `low_rank_clients.products`.

    Returns:
      y_KxTxF, of the dtype of ``x``.

    Raises:
      ValueError: Shapes or dtypes do not fit, or the implementation is none, or "pallas" is asked
        for by name and a TPU's fast memory is not enough for it.
    """
    clients, positions, width = _three("x", x_KxTxD)
    if _three("a", a_KxDxR)[:2] != (clients, width) or _three("b", b_KxRxF)[:2] != (
        clients,
        a_KxDxR.shape[2],
    ):
        raise ValueError(
            f"x, a and b must be [K, T, D], [K, D, R] and [K, R, F], got {x_KxTxD.shape}, "
            f"{a_KxDxR.shape} and {b_KxRxF.shape}; give every client one adapter"
        )
    if not x_KxTxD.dtype == a_KxDxR.dtype == b_KxRxF.dtype:
        raise ValueError(
            f"x, a and b must be of one dtype, got {x_KxTxD.dtype}, {a_KxDxR.dtype} and "
            f"{b_KxRxF.dtype}; cast the adapter to that of the activations"
        )
    if implementation == "pallas":
        from . import many_adapters_pallas

        # Who measures forms is not to be given another one.
        rank, outputs = b_KxRxF.shape[1:]
        itemsize = x_KxTxD.dtype.itemsize
        many_adapters_pallas.tpu_positions(positions, width, rank, [outputs], itemsize, True)
    form = low_rank_xla.products
    if choice.of("many_adapters", implementation) == "pallas":
        form = low_rank_clients.products
    (found,) = jax.vmap(form, in_axes=(0, 0, 0, None))(x_KxTxD, (a_KxDxR,), (b_KxRxF,), scale)
    return found


def _three(name: str, array: jax.Array) -> tuple[int, int, int]:
    if array.ndim != 3:
        raise ValueError(f"{name} must have three axes, got {array.shape}; the first is the client")
    first, second, third = array.shape
    return first, second, third
