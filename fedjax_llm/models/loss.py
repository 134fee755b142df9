"""The language-model loss of each row, without its matrix of logits."""

import jax
import jax.numpy as jnp

from fedjax_llm.models.batch import Batch
from fedjax_llm.models.config import DecoderConfig
from fedjax_llm.models.decoder import AdapterLike, Base, bind, hidden
from fedjax_llm_kernels.cross_entropy import chunked_cross_entropy


def target_nll(
    config: DecoderConfig,
    base: Base,
    adapter: AdapterLike | None,
    batch: Batch,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of every token but the first of the row.

    Returns:
      nll_BxU: float32 nats, U = T - 1; entry u belongs to ``tokens[u + 1]``; 0 where not counted.
      counted_BxU: bool, where ``loss_mask`` asks for the token and the token before it belongs to
        the same segment.
    """
    tokens_BxT = jnp.asarray(batch.tokens_BxT)
    segments_BxT = jnp.asarray(batch.segments_BxT)
    rows, length = tokens_BxT.shape
    x_BxTxD = hidden(
        config, base, adapter, tokens_BxT, segments_BxT, dtype=dtype, remat=remat, unroll=unroll
    )
    targets_BxU, segment_BxU = tokens_BxT[:, 1:], segments_BxT[:, 1:]
    counted_BxU = (
        jnp.asarray(batch.loss_mask_BxT)[:, 1:]
        & (segment_BxU == segments_BxT[:, :-1])
        & (segment_BxU > 0)
    )
    unembed_VxD = jax.lax.stop_gradient(bind(config, base).unembedding(dtype))
    nll_N = chunked_cross_entropy(
        x_BxTxD[:, :-1].reshape(rows * (length - 1), -1),
        unembed_VxD,
        targets_BxU.reshape(rows * (length - 1)),
    )
    return jnp.where(counted_BxU, nll_N.reshape(rows, length - 1), 0.0), counted_BxU


def loss(
    config: DecoderConfig,
    base: Base,
    adapter: AdapterLike | None,
    batch: Batch,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of counted tokens of each row.

    Differentiable once, in reverse mode, with respect to ``adapter``. The unembedding is held
    constant, so this is not the gradient for training ``base``, which is frozen here.

    Args:
      config: Static description.
      base: Frozen weights.
      adapter: Low-rank additions, or None.
      batch: Rows; a row without counted tokens gives (0, 0) and a gradient of zero.
      dtype: Of activations and matrix products.
      remat: Recompute each layer in the backward pass.
      unroll: Layers that are compiled in a row, see `hidden`.

    Returns:
      nll_sum_B: float32 nats.
      tokens_B: int32.
    """
    nll_BxU, counted_BxU = target_nll(
        config, base, adapter, batch, dtype=dtype, remat=remat, unroll=unroll
    )
    return jnp.sum(nll_BxU, axis=1), jnp.sum(counted_BxU, axis=1, dtype=jnp.int32)
