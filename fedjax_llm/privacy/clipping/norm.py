"""One tree, one norm: the step that every way to clip is made of."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm_kernels.clip_norm import clip_arrays

PyTree = Any


def clip(tree: PyTree, clip_norm: float | jax.Array) -> tuple[PyTree, jax.Array]:
    """Scales a tree down to an l2 norm of at most `clip_norm` over all its leaves together.

    Formal guarantee: for every input, ||out||_2 <= clip_norm as a real number, where out is read
    as the float32 values returned. The norm is computed in float32 and taken to be larger by a
    factor of 1 + 2^-14, which exceeds its worst-case rounding error, so a clipped tree is shorter
    than `clip_norm` by up to that factor. Values are scaled by a power of two near the
    largest magnitude, so that their squares neither overflow nor vanish.

    | input                                  | output                 | norm reported |
    |----------------------------------------|------------------------|---------------|
    | all zeros, or no leaves, or no elements| unchanged              | 0             |
    | norm (with margin) <= clip_norm        | unchanged              | the norm      |
    | finite, however large                  | scaled to clip_norm    | the norm, inf above 3.4e38 |
    | any leaf holds NaN or inf              | all zeros              | inf           |
    | all magnitudes below 1.2e-38 (denormal)| all zeros              | 0             |
    | clip_norm is inf                       | unchanged              | the norm      |
    | clip_norm below 2^-96 = 1.3e-29, or NaN| all zeros              | the norm      |

    Args:
        tree: pytree of real arrays of any shapes; they are read as float32.
        clip_norm: [] float32, in the unit of the tree.

    Returns:
        The clipped tree (same structure and shapes, float32) and the norm before clipping ([]).
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]
    clipped, norm = clip_arrays(leaves, clip_norm)
    return jax.tree.unflatten(structure, clipped), norm


def counted_sum(leaf_E: jax.Array, counts_E: jax.Array) -> jax.Array:
    """The sum of the entries that count, float32; what the others hold does not matter."""
    mask_E = counts_E.reshape(-1, *[1] * (leaf_E.ndim - 1))
    return jnp.where(mask_E, leaf_E, jnp.float32(0)).sum(axis=0)
