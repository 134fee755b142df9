"""Our side of FedJAX's task: our local update, our layout of clients; no decoder. By run.py.

`Federation` takes a decoder and an adapter, so that what is used here is what serves any pytree:
`client_update`, `CohortLayout.map_clients` and the keys. The weighted mean and the server's step,
which is plus one times the mean, are written out.

Letters: C clients of the population, K of a round, N rows of the longest, B rows a step.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dense_tasks import DENSE, DenseTask, clients, cohort
from tasks import read_factors, write_factors
from turns import Turns, arguments

from fedjax_llm.federation import CohortLayout, Purpose, key_for
from fedjax_llm.training import ClientTable, LocalTraining, client_update, each_row, optimizer_init

PyTree = Any


def logits(params: PyTree, image: jax.Array) -> jax.Array:
    """Of one image; three dense layers, as FedJAX's `create_dense_model`."""
    x = image.reshape(-1)
    for layer in range(2):
        x = jax.nn.relu(x @ params[f"w{layer}"] + params[f"b{layer}"])
    return x @ params["w2"] + params["b2"]


def row_loss(params: PyTree, row: PyTree) -> jax.Array:
    """Cross entropy of one image in nats."""
    image, label = row
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


def tables(folder: Path) -> tuple[PyTree, jax.Array]:
    """All clients' rows on the device, padded to the longest, and how many are real."""
    found = clients(folder)
    sizes_C = np.array([len(labels) for _, labels in found], np.int32)
    images_CxN, labels_CxN = (
        np.stack(
            [
                np.pad(rows, [(0, max(sizes_C) - len(rows))] + [(0, 0)] * (rows.ndim - 1))
                for rows in side
            ]
        )
        for side in zip(*found, strict=True)
    )
    return (jnp.asarray(images_CxN), jnp.asarray(labels_CxN)), jnp.asarray(sizes_C)


def round_program(task: DenseTask, layout: CohortLayout, most_rows: int) -> Any:
    """`(params, rows, sizes, clients of the round, seed, number) -> params`, compiled."""
    training = LocalTraining(
        optax.sgd(task.learning_rate), task.epochs * most_rows // task.batch, task.batch, task.batch
    )

    def one_client(shared: PyTree, place: jax.Array) -> PyTree:
        params, rows_CxN, sizes_C, seed, number = shared
        rows, population = jax.tree.map(lambda leaf: leaf[place], (rows_CxN, sizes_C))
        key = key_for(seed, Purpose.EXAMPLE_SAMPLING, number, place)
        table = ClientTable(rows, population, jnp.float32(0))
        state = optimizer_init(training.optimizer, params)
        steps = task.epochs * population // task.batch
        losses = each_row(row_loss)
        trained = client_update(losses, training, params, state, table, key, key, steps)
        return jax.tree.map(jnp.subtract, trained.trainable, params)

    @jax.jit
    def whole_round(
        params: PyTree,
        rows_CxN: PyTree,
        sizes_C: jax.Array,
        places_K: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> PyTree:
        deltas_K = layout.map_clients(one_client)(
            (params, rows_CxN, sizes_C, seed, number), places_K
        )
        sizes_K = sizes_C[places_K]
        shares_K = sizes_K.astype(jnp.float32) / jnp.sum(sizes_K).astype(jnp.float32)
        return jax.tree.map(lambda p, d: p + jnp.tensordot(shares_K, d, axes=1), params, deltas_K)

    return whole_round


def in_order(clients_K: np.ndarray, rows_C: np.ndarray, at_once: int) -> np.ndarray:
    """A round's clients, so that batches and devices are through at about the same time.

    A batch goes on until its longest client is through: like ones stand together. Devices take
    stretches of the order, and batches are dealt among them.
    """
    batches_QxG = clients_K[np.argsort(rows_C[clients_K], kind="stable")].reshape(-1, at_once)
    devices = jax.device_count()
    return np.concatenate([batches_QxG[device::devices] for device in range(devices)]).reshape(-1)


def main() -> None:
    """Builds, then trains a round a turn."""
    parser = arguments(__doc__.splitlines()[0], list(DENSE))
    parser.add_argument("--at-once", type=int, default=1, help="clients in a batch")
    asked = parser.parse_args()
    turns, task = Turns(asked.wait), DENSE[asked.task]
    layout = CohortLayout.over(task.cohort, asked.at_once)
    # Elsewhere, a round would move them.
    (images_CxN, labels_CxN), sizes_C = layout.replicate(tables(asked.folder))
    rows_C = np.asarray(sizes_C)
    if layout.padded != task.cohort:
        raise ValueError(f"{task.cohort} clients do not divide into {asked.at_once} at once")
    program = round_program(task, layout, images_CxN.shape[1])
    # As the program returns them: elsewhere, the second round would be compiled anew.
    params = layout.replicate(read_factors(asked.folder / "start.npz"))
    first = (images_CxN[0, : sizes_C[0]], labels_CxN[0, : sizes_C[0]])
    loss = jax.jit(lambda p: jnp.mean(jax.vmap(row_loss, in_axes=(None, 0))(p, first)))
    seed = jax.random.key(task.seed)
    turns.ready(jax=jax.__version__, devices=jax.device_count(), group=layout.group)
    for number in range(asked.rounds):
        started = turns.go()
        params = program(
            params,
            (images_CxN, labels_CxN),
            sizes_C,
            in_order(cohort(task, number), rows_C, asked.at_once),
            seed,
            np.int32(number),
        )
        jax.block_until_ready(params)
        turns.done(started, lambda params=params: float(loss(params)))
    if asked.out:
        write_factors(asked.out, {name: np.asarray(value) for name, value in params.items()})
    turns.end()


if __name__ == "__main__":
    main()
