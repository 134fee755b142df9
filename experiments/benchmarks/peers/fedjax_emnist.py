"""FedJAX on its own EMNIST task: its model, its algorithm, its data sets. Started by run.py."""

import importlib.metadata
import os

# Read when the backend starts: devices for FedJAX's other way to go over clients.
if "FEDJAX_DEVICES" in os.environ:
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={os.environ['FEDJAX_DEVICES']}"
    )

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from dense_tasks import DENSE, clients, cohort
from tasks import read_factors, write_factors
from turns import Turns, arguments

# Haiku's names of the three layers.
LAYERS = ("linear", "linear_1", "linear_2")


def main() -> None:
    """Loads, then trains a round a turn."""
    parser = arguments(__doc__.splitlines()[0], list(DENSE))
    parser.add_argument("--backend", choices=("jit", "pmap"), default="jit")
    asked = parser.parse_args()
    turns, task = Turns(asked.wait), DENSE[asked.task]
    fedjax.set_for_each_client_backend(asked.backend)
    model = fedjax.models.emnist.create_dense_model(only_digits=False)
    start = read_factors(asked.folder / "start.npz")
    params = {
        layer: {"w": jnp.asarray(start[f"w{i}"]), "b": jnp.asarray(start[f"b{i}"])}
        for i, layer in enumerate(LAYERS)
    }
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(task.learning_rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=task.batch, num_epochs=task.epochs),
    )
    data = [
        fedjax.ClientDataset({"x": images, "y": labels}) for images, labels in clients(asked.folder)
    ]
    everything = data[0].raw_examples
    loss = jax.jit(
        lambda p: jnp.mean(model.train_loss(everything, model.apply_for_eval(p, everything)))
    )
    state = algorithm.init(params)
    turns.ready(
        fedjax=importlib.metadata.version("fedjax"),
        jax=jax.__version__,
        backend=asked.backend,
        devices=jax.device_count(),
    )
    for number in range(asked.rounds):
        started = turns.go()
        keys = jax.random.split(jax.random.key(number), task.cohort)
        chosen = [(str(c), data[c], key) for c, key in zip(cohort(task, number), keys, strict=True)]
        state, _ = algorithm.apply(state, chosen)
        jax.block_until_ready(state.params)
        turns.done(started, lambda state=state: float(loss(state.params)))
    if asked.out:
        write_factors(
            asked.out,
            {
                f"{side}{i}": np.asarray(state.params[layer][side])
                for i, layer in enumerate(LAYERS)
                for side in "wb"
            },
        )
    turns.end()


if __name__ == "__main__":
    main()
