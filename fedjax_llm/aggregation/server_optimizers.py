"""The optimisers by which the server takes its step, all of them optax's."""

from collections.abc import Callable

import optax

from fedjax_llm.training import OPTIMIZERS

# tau of arXiv 2003.00295, algorithm 2, with the values of its section 5.
_TAU = 1e-3

SERVER_OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    **OPTIMIZERS,
    # arXiv 1602.05629: the mean takes the adapter's place at rate 1.
    "fedavg": optax.sgd,
    # arXiv 1909.06335.
    "fedavgm": lambda rate: optax.sgd(rate, momentum=0.9),
    # arXiv 2003.00295. Optax corrects the bias of the first steps, the paper's algorithm does not.
    "fedadagrad": lambda rate: optax.adagrad(rate, initial_accumulator_value=_TAU**2, eps=1e-10),
    "fedadam": lambda rate: optax.adam(rate, b1=0.9, b2=0.99, eps=_TAU),
    "fedyogi": lambda rate: optax.yogi(rate, b1=0.9, b2=0.99, eps=_TAU),
    # arXiv 2311.08105, outer optimiser; its rate is 0.7.
    "diloco": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
}
