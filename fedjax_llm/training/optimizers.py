"""The optimisers that a run file can name, for clients and server alike, and one step of any."""

from collections.abc import Callable
from typing import Any

import jax
import optax

PyTree = Any

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
}


def optimizer_step(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the parameters and the optimiser's state after one step; pure.

    Args:
        optimizer: any optax transformation.
        gradient: like `params`.
        state: from `optimizer.init(params)` or the last step.
        params: float32 leaves.
    """
    # Optax counts steps in integers and raises floats to them, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state
