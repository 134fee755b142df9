"""The optimisers that a run file can name, for clients and server alike, and one step of any."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

PyTree = Any

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
}

# Of those that have one, for FedNova's norm of local steps.
MOMENTUM = {"momentum": 0.9, "nesterov": 0.9}


def optimizer_init(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Returns the optimiser's state for `params`, flattened to one vector."""
    return optimizer.init(ravel_pytree(params)[0])


def optimizer_step(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the parameters and the optimiser's state after one step; pure.

    The step works on one flat vector, behind barriers: fused with its neighbours, or shared
    between leaves, XLA contracts Adam's arithmetic one way on one device and another way on two,
    and a run would not end in the same bytes. What only multiplies the gradient, as plain descent
    does, leaves one way to contract a step: a product and the sum with the parameters. It goes leaf
    by leaf, and saves four passes over the parameters.

    Args:
        optimizer: any optax transformation.
        gradient: like `params`.
        state: from `optimizer_init` or the last step.
        params: float32 leaves.
    """
    if _only_multiplies(optimizer, state):
        gradient, params = jax.lax.optimization_barrier((gradient, params))
        updates, state = optimizer.update(gradient, state, params)
        moved = optax.apply_updates(params, updates)
        return jax.lax.optimization_barrier(moved), state
    flat_params, unravel = ravel_pytree(params)
    operands = (ravel_pytree(gradient)[0], state, flat_params)
    flat_gradient, state, flat_params = jax.lax.optimization_barrier(operands)
    # Optax counts steps in integers and raises floats to them, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(flat_gradient, state, flat_params)
    after = jax.lax.optimization_barrier((optax.apply_updates(flat_params, updates), state))
    return unravel(after[0]), after[1]


def _only_multiplies(optimizer: optax.GradientTransformation, state: PyTree) -> bool:
    """Whether an update is products with the gradient and nothing else, and nothing is kept.

    Then it is the same for a tree and for its vector, and holds no sum that could be contracted.
    """
    if jax.tree.leaves(state):
        return False
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(optimizer.update)(one, state, one)
    return all(equation.primitive.name in ("mul", "neg") for equation in traced.eqns)
