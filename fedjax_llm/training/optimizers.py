"""The optimisers that a run file can name, for clients and server alike."""

from collections.abc import Callable

import optax

# AdaGrad, Adam and Yogi take 1e-3 as their epsilon, the value of arXiv 2003.00295 for servers,
# whose updates are small; clients under noise want the same floor under the second moment.
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
