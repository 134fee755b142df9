"""Gaussian noise shaped like a tree."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def gaussian_noise_like(key: jax.Array, tree: PyTree, stddev: float | jax.Array) -> PyTree:
    """Independent draws from N(0, stddev^2), one for each coordinate of a tree.

    Formal guarantee: none by itself. A sum of l2 sensitivity S plus this noise with
    stddev = noise_multiplier * S is the Gaussian mechanism that `PrivacyPlan` accounts for, in
    real arithmetic and with true randomness. Two things fall short of that:

    - Floating point. Sampled float32 normals take finitely many values (about 2^24, none beyond
      5.5 standard deviations), and which sums are possible can betray the input's low bits
      (Mironov 2012, doi:10.1145/2382196.2382264, for Laplace noise; Jin et al., arXiv:2112.05307,
      for Gaussian). Encoding the noised message to fixed point coarsens what is seen but is no
      proof.
    - The generator. A threefry key holds 64 bits and is derived from the run's seed: whoever
      knows the seed can take the noise off. This is right for simulation, where runs must repeat.
      In a deployment the noise must come from the operating system's generator and the seed be
      no one's.

    | stddev    | result         |
    |-----------|----------------|
    | 0         | zeros          |
    | inf, NaN  | not finite     |

    Args:
        key: a JAX key that is used for nothing else.
        tree: pytree of arrays; only structure and shapes are read.
        stddev: [] float32, in the unit of the sum.

    Returns:
        A float32 tree of the same structure and shapes.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    scale = jnp.asarray(stddev, jnp.float32)
    noise = [
        scale * jax.random.normal(keys[i], jnp.shape(leaf), jnp.float32)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noise)
