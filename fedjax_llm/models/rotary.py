"""Rotary positions: frequencies, their stretching, and the rotation (arXiv 2104.09864)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models.config import DecoderConfig


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each position and frequency, float32 [B, T, head_dim / 2]."""

    cos_BxTxF: jax.Array
    sin_BxTxF: jax.Array


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per token of each pair of coordinates, float32 [head_dim / 2]."""
    exponents_F = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq_F = (1.0 / np.float32(config.rope_theta) ** exponents_F).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return freq_F
    if scaling.kind == "linear":
        return (freq_F / np.float32(scaling.factor)).astype(np.float32)
    # Turns made over the context trained on: many turns are kept, few are stretched.
    turns_F = scaling.original_max_positions * freq_F / (2 * np.pi)
    keep_F = (turns_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep_F = np.clip(keep_F, 0.0, 1.0)
    return (freq_F * (keep_F + (1.0 - keep_F) / scaling.factor)).astype(np.float32)


def rotation(config: DecoderConfig, positions_BxT: jax.Array) -> Rotation:
    """The rotation of each position; angles are float32 whatever the activations are."""
    freq_F = jnp.asarray(frequencies(config))
    angles_BxTxF = positions_BxT.astype(jnp.float32)[..., None] * freq_F[None, None, :]
    turned = Rotation(jnp.cos(angles_BxTxF), jnp.sin(angles_BxTxF))
    # XLA on a CPU would compute them anew in every layer and for every head.
    return jax.lax.optimization_barrier(turned)


def rotate(x_BxTxHxK: jax.Array, by: Rotation) -> jax.Array:
    """Turns coordinate i against coordinate i + head_dim / 2 (the layout of Hugging Face)."""
    cos_BxTx1xF = by.cos_BxTxF[:, :, None, :].astype(x_BxTxHxK.dtype)
    sin_BxTx1xF = by.sin_BxTxF[:, :, None, :].astype(x_BxTxHxK.dtype)
    first, second = jnp.split(x_BxTxHxK, 2, axis=-1)
    return jnp.concatenate(
        [
            first * cos_BxTx1xF - second * sin_BxTx1xF,
            second * cos_BxTx1xF + first * sin_BxTx1xF,
        ],
        axis=-1,
    )


def segment_positions(segments_BxT: jax.Array) -> jax.Array:
    """Position of each token within its contiguous segment, int32 [B, T]."""
    index_1xT = jnp.arange(segments_BxT.shape[1], dtype=jnp.int32)[None, :]
    starts_BxT = jnp.concatenate(
        [
            jnp.ones_like(segments_BxT[:, :1], dtype=bool),
            segments_BxT[:, 1:] != segments_BxT[:, :-1],
        ],
        axis=1,
    )
    start_BxT = jax.lax.cummax(jnp.where(starts_BxT, index_1xT, 0), axis=1)
    return index_1xT - start_BxT
