"""A step of any optimiser is that of the whole tree, whichever way it goes over the leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.training import OPTIMIZERS, optimizer_init
from fedjax_llm.training.optimizers import optimizer_step

Tree = dict[str, Any]
P = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) - 2.5, "b": jnp.float32([0.5, -4.0])}
G = {"w": jnp.linspace(-3.0, 2.0, 6, dtype=jnp.float32).reshape(2, 3), "b": jnp.float32([8.0, 1.0])}


def clipped(tree: Tree) -> Tree:
    """To norm 1, of all leaves together."""
    norm = np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in tree.values()))
    return {name: np.asarray(leaf, np.float64) / max(1.0, norm) for name, leaf in tree.items()}


# One step from the start, in float64.
ORACLES: dict[str, tuple[optax.GradientTransformation, Callable[[Any, Any, Any], Any]]] = {
    "sgd": (optax.sgd(0.1), lambda p, g, c: p - 0.1 * g),
    "sgd, ascending": (optax.scale(0.25), lambda p, g, c: p + 0.25 * g),
    "decayed": (
        optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)),
        lambda p, g, c: p - 0.1 * (g + 0.5 * p),
    ),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        lambda p, g, c: p - 0.1 * c,
    ),
    "momentum": (OPTIMIZERS["momentum"](0.1), lambda p, g, c: p - 0.1 * g),
    "adam": (OPTIMIZERS["adam"](0.1), lambda p, g, c: p - 0.1 * g / (np.abs(g) + 1e-8)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_step_is_that_of_the_whole_tree(name: str) -> None:
    optimizer, oracle = ORACLES[name]
    state = optimizer_init(optimizer, P)
    after, kept = jax.jit(lambda g, s, p: optimizer_step(optimizer, g, s, p))(G, state, P)
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    parts = clipped(G)
    for leaf, p in P.items():
        expected = oracle(np.asarray(p, np.float64), np.asarray(G[leaf], np.float64), parts[leaf])
        np.testing.assert_allclose(after[leaf], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "vector"), [("sgd", False), ("sgd, ascending", False), ("decayed", True),
                         ("clipped", True), ("momentum", True), ("adam", True)]
)  # fmt: skip
def test_what_adds_goes_as_one_vector(name: str, vector: bool) -> None:
    optimizer, _ = ORACLES[name]
    state = optimizer_init(optimizer, P)
    traced = jax.make_jaxpr(lambda g, s, p: optimizer_step(optimizer, g, s, p))(G, state, P)
    assert ("concatenate" in str(traced)) == vector
