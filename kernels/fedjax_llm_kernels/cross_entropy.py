"""Cross entropy against a large frozen vocabulary, without the matrix of logits.

The dense form writes an N x V matrix of logits, its softmax and its gradient: for 1,024 positions
and 49,152 words three times 201 MB. Here the vocabulary passes by in chunks, and each row keeps its
running maximum and sum (the online log-sum-exp of arXiv 1805.02867) and, when the gradient is
wanted, its running softmax-weighted mean of the unembedding rows, rescaled whenever the maximum
grows (as in arXiv 2112.05682 with keys = values = unembedding). In the XLA form a chunk of logits
goes through memory; in the Pallas forms (`cross_entropy_pallas`) a tile of them never leaves the
core.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import choice
from .pallas_forms import Implementation, by_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_cross_entropy(
    hidden_NxD: jax.Array,
    unembed_VxD: jax.Array,
    targets_N: jax.Array,
    chunk: int = 4096,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``logsumexp(hidden @ unembed.T) - (hidden @ unembed.T)[target]`` for each row.

    Memory is N x (chunk + 2 D) floats beside the arguments (Pallas: N x 2 D). The value
    costs one matrix product with the unembedding; value and gradient together cost two (a dense or
    a recomputing version costs two and three), because the gradient's softmax average is
    accumulated in the same pass.

    Differentiable once, in reverse mode, with respect to ``hidden`` only: the unembedding is
    frozen. A derivative with respect to the unembedding is refused with a ``TypeError`` while
    tracing; it is never silently zero.

    Edge cases:
      ``V`` not a multiple of ``chunk``: the rest is one smaller chunk.
      A target outside [0, V): NaN loss and NaN gradient for that row alone.
      A non-finite row of ``hidden``: NaN loss and NaN gradient for that row alone.

    Args:
      hidden_NxD: Final activations, float32 or bfloat16.
      unembed_VxD: Frozen output embedding, of the same dtype.
      targets_N: int32 indices in [0, V).
      chunk: Vocabulary rows per step of the XLA form; a static Python integer of at least 1.
      implementation: "xla", "pallas", or None for what ``choice`` names for the device kind. The
        forms add in different orders: they agree up to rounding, not bit for bit.

    Returns:
      nll_N: float32 nats.

    Raises:
      ValueError: ``chunk`` is below 1, or the implementation is none.
      TypeError: A derivative with respect to ``unembed_VxD`` is asked for.
    """
    nll_N, _ = _losses(
        hidden_NxD, unembed_VxD, targets_N, chunk, implementation, with_gradient=False
    )
    return nll_N


def _losses(
    hidden_NxD: jax.Array,
    unembed_VxD: jax.Array,
    targets_N: jax.Array,
    chunk: int,
    implementation: Implementation | None,
    *,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The loss of each row and, if asked, its gradient with respect to the row of hidden."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if choice.of("cross_entropy", implementation) == "pallas":
        from .cross_entropy_pallas import gpu_pass, tpu_pass

        lse_Nx1, *means = by_platform(
            functools.partial(tpu_pass, with_gradient=with_gradient),
            functools.partial(gpu_pass, with_gradient=with_gradient),
            hidden_NxD,
            unembed_VxD,
        )
        lse_N, mean_NxD = lse_Nx1[:, 0], means[0] if means else None
    else:
        lse_N, mean_NxD = _scan_vocabulary(
            hidden_NxD, unembed_VxD, chunk, with_gradient=with_gradient
        )
    # Negative indices would wrap around; the fill makes every wrong target visible as NaN.
    targets_N = jnp.where(targets_N < 0, unembed_VxD.shape[0], targets_N)
    target_NxD = jnp.take(unembed_VxD, targets_N, axis=0, mode="fill", fill_value=jnp.nan)
    target_logit_N = jnp.einsum(
        "nd,nd->n", hidden_NxD, target_NxD, preferred_element_type=jnp.float32
    )
    nll_N = lse_N - target_logit_N
    if mean_NxD is None:
        return nll_N, None
    return nll_N, mean_NxD - target_NxD.astype(jnp.float32)


def _scan_vocabulary(
    hidden_NxD: jax.Array, unembed_VxD: jax.Array, chunk: int, *, with_gradient: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The log-sum-exp of each row and, if asked, the weighted mean of the unembedding rows."""
    rows, width = hidden_NxD.shape
    vocabulary = unembed_VxD.shape[0]
    chunk = min(chunk, vocabulary)
    full_chunks, rest = divmod(vocabulary, chunk)
    Carry = tuple[jax.Array, jax.Array, jax.Array | None]

    def absorb(carry: Carry, unembed_CxD: jax.Array) -> Carry:
        max_N, sum_N, mean_NxD = carry
        logits_NxC = jnp.einsum(
            "nd,cd->nc", hidden_NxD, unembed_CxD, preferred_element_type=jnp.float32
        )
        new_max_N = jnp.maximum(max_N, jnp.max(logits_NxC, axis=1))
        weights_NxC = jnp.exp(logits_NxC - new_max_N[:, None])
        shrink_N = jnp.exp(max_N - new_max_N)
        sum_N = sum_N * shrink_N + jnp.sum(weights_NxC, axis=1)
        if mean_NxD is not None:
            mean_NxD = mean_NxD * shrink_N[:, None] + jnp.einsum(
                "nc,cd->nd",
                weights_NxC.astype(unembed_CxD.dtype),
                unembed_CxD,
                preferred_element_type=jnp.float32,
            )
        return new_max_N, sum_N, mean_NxD

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        # A slice of the whole array: reshaping V into chunks would copy it when V has a rest.
        return absorb(
            carry, jax.lax.dynamic_slice_in_dim(unembed_VxD, index * chunk, chunk, axis=0)
        ), None

    carry: Carry = (
        # Finite, so that exp(max - new_max) is 0 and not NaN at the first chunk.
        jnp.full((rows,), jnp.finfo(jnp.float32).min),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32) if with_gradient else None,
    )
    carry, _ = jax.lax.scan(step, carry, jnp.arange(full_chunks, dtype=jnp.int32))
    if rest:
        carry = absorb(carry, unembed_VxD[full_chunks * chunk :])
    max_N, sum_N, mean_NxD = carry
    lse_N = max_N + jnp.log(sum_N)
    return lse_N, None if mean_NxD is None else mean_NxD / sum_N[:, None]


def _forward(
    hidden_NxD: Any,
    unembed_VxD: Any,
    targets_N: Any,
    chunk: int,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    # With symbolic_zeros every argument arrives with a flag: is a derivative asked for?
    if unembed_VxD.perturbed:
        raise TypeError(
            "chunked_cross_entropy has no derivative with respect to unembed_VxD, which it takes "
            "as frozen; apply jax.lax.stop_gradient to it"
        )
    nll_N, gradient_NxD = _losses(
        hidden_NxD.value,
        unembed_VxD.value,
        targets_N.value,
        chunk,
        implementation,
        with_gradient=True,
    )
    assert gradient_NxD is not None
    return nll_N, gradient_NxD.astype(hidden_NxD.value.dtype)


def _backward(
    chunk: int, implementation: Implementation | None, gradient_NxD: jax.Array, cotangent_N: Any
) -> tuple[jax.Array, None, None]:
    del chunk, implementation
    if not isinstance(cotangent_N, jax.Array):
        return jnp.zeros_like(gradient_NxD), None, None
    return cotangent_N[:, None].astype(gradient_NxD.dtype) * gradient_NxD, None, None


chunked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
