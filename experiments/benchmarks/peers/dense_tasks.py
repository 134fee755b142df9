"""FedJAX's EMNIST task: what both sides do, and arrays in EMNIST's shapes from a seed.

EMNIST itself is not fetched. Both sides take the same arrays: images of 28 x 28 that are a class's
own pattern and noise about zero, 62 classes, and clients of as many rows as EMNIST's have, in whole
batches, so that both sides take the same steps. What is measured, time, does not depend on the
values.

Sides shuffle in orders of their own. To compare losses there is a second task, in which a client
has the rows of one batch and takes them several times.

Letters: C clients of the population, K of a round, N rows of a client, B rows a step.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASSES = 62
HIDDEN = 200
PIXELS = (28, 28)


@dataclass(frozen=True)
class DenseTask:
    """Federated averaging of FedJAX's dense EMNIST model, server step 1.

    Attributes:
        population: C.
        cohort: K; rounds take the population's clients in their order.
        batch: B.
        epochs: of a client in a round.
        mean_rows: about which the rows of clients are drawn, as EMNIST's 671,585 rows of 3,400
            clients; with a third of it as deviation. 0 for one batch each.
        learning_rate: of the clients.
        seed: of all that is drawn.
    """

    population: int
    cohort: int
    batch: int
    epochs: int
    mean_rows: int
    learning_rate: float = 10**-1.5
    seed: int = 0

    @property
    def most_rows(self) -> int:
        """The longest client's rows; what is drawn above is cut."""
        return max(self.batch, 2 * self.mean_rows)


# FedJAX's own example takes 10 clients a round, batches of 20, one epoch, this rate.
DENSE: dict[str, DenseTask] = {
    "emnist": DenseTask(100, 10, 20, 1, 200),
    "emnist-check": DenseTask(10, 10, 20, 5, 0),
}


def write(task: DenseTask, folder: Path) -> None:
    """Writes `images` [rows, 28, 28], `labels`, `sizes` [C] and the first weights."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(task.seed)
    drawn_C = draw.normal(task.mean_rows, task.mean_rows / 3, task.population)
    batches_C = np.rint(np.clip(drawn_C, task.batch, task.most_rows) / task.batch)
    sizes_C = (task.batch * batches_C).astype(np.int64)
    patterns = draw.random((CLASSES, *PIXELS), np.float32)
    labels = draw.integers(0, CLASSES, sizes_C.sum()).astype(np.int32)
    noise = draw.random((len(labels), *PIXELS), np.float32)
    images = np.float32(0.5) * (patterns[labels] + noise - np.float32(1))
    sizes = (math.prod(PIXELS), HIDDEN, HIDDEN, CLASSES)
    weights = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        scale = np.float32(inputs**-0.5)
        weights[f"w{layer}"] = scale * draw.standard_normal((inputs, outputs), np.float32)
        weights[f"b{layer}"] = np.zeros(outputs, np.float32)
    np.savez(folder / "start.npz", **weights)
    np.savez(folder / "rows.npz", images=images, labels=labels, sizes=sizes_C)


def clients(
    folder: Path,
) -> list[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Images and labels of each client."""
    with np.load(folder / "rows.npz") as stored:
        images, labels, sizes = stored["images"], stored["labels"], stored["sizes"]
    ends = np.cumsum(sizes)
    return [
        (images[end - n : end], labels[end - n : end]) for end, n in zip(ends, sizes, strict=True)
    ]


def cohort(task: DenseTask, number: int) -> NDArray[np.int32]:
    """The clients of a round, from 0; int32 [K]."""
    return ((number * task.cohort + np.arange(task.cohort)) % task.population).astype(np.int32)
