"""What all sides of a comparison do: sizes, rates, and where their files lie.

Every environment imports it: the standard library and numpy alone. A folder that `prepare.py` has
written holds, for a task:

| file | what |
|---|---|
| model/ | config.json and model.safetensors, Hugging Face's layout |
| tokens.npy | int32 [K, B, T], the rows of each client |
| start.npz | the adapter before the first round, float32: NAME.a [L, D, R], NAME.b [L, R, F] |

A client has as many rows as one step takes. Each step takes all of them, so that the order in which
a side draws them cannot matter, and losses can be compared between sides that shuffle differently.

Letters: K clients, B rows a step, T tokens, L layers, D inputs, R rank, F outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = PROJECTIONS[:4]


@dataclass(frozen=True)
class Task:
    """One federated round of LoRA, the same for all sides.

    Plain gradient descent, because what other optimisers carry from round to round is kept by some
    sides and dropped by others; the server takes the clients' mean.

    Attributes:
        clients: K, all of them in every round.
        steps: of a client in a round.
        batch: rows a step, B, and rows of a client.
        length: tokens a row, T.
        learning_rate: of the clients.
        model: a name in `prepare.DRAWN` for weights drawn at random, or a folder of the shared
            models.
        rank: of the adapter on all seven projections.
        alpha: the update is multiplied by alpha / rank.
        seed: of weights, rows and adapter.
        dtype: of weights and matrix products, as numpy and PyTorch name it; the adapter is float32.
    """

    clients: int
    steps: int
    batch: int
    length: int
    learning_rate: float
    model: str
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Positions that go through the model in a round."""
        return self.clients * self.steps * self.batch * self.length


TASKS: dict[str, Task] = {
    "decoder": Task(8, 4, 4, 128, 0.5, "random"),
    "thousand": Task(1000, 1, 1, 64, 0.02, "stories260K"),
    # Half of the decoder's clients, for one process where two take them all.
    "half": Task(4, 4, 4, 128, 0.5, "random"),
    # For peak memory: the cohort alone differs.
    "cohort-100": Task(100, 1, 1, 64, 0.02, "stories260K"),
    "cohort-10000": Task(10_000, 1, 1, 64, 0.02, "stories260K"),
    # For an accelerator: sixteen clients of a billion parameters, and the same in small.
    "billion": Task(16, 2, 1, 1024, 0.1, "billion", dtype="bfloat16"),
    "billion-tiny": Task(16, 2, 1, 32, 0.5, "billion-tiny", dtype="bfloat16"),
}


def model_folder(folder: Path) -> Path:
    """Where a task's model lies."""
    return folder / "model"


def read_tokens(folder: Path) -> NDArray[np.int32]:
    """The rows of all clients, int32 [K, B, T]; not read before they are used."""
    return np.load(folder / "tokens.npy", mmap_mode="r")


def read_factors(path: Path) -> dict[str, NDArray[np.float32]]:
    """An adapter as `write_factors` wrote it."""
    with np.load(path) as stored:
        return dict(stored)


def write_factors(path: Path, factors: Mapping[str, NDArray[np.float32]]) -> None:
    """Writes an adapter: NAME.a [L, D, R] and NAME.b [L, R, F]."""
    np.savez(path, **factors)


def distance(
    first: Mapping[str, NDArray[np.float32]],
    second: Mapping[str, NDArray[np.float32]],
    start: Mapping[str, NDArray[np.float32]],
) -> float:
    """How far two trained trees lie apart, over how far the first came from the start.

    Raises:
        ValueError: they have different names, or the first has not moved.
    """
    if not first.keys() == second.keys() == start.keys():
        raise ValueError("the trees to compare have different names")

    def norm(x: Mapping[str, NDArray[np.float32]], y: Mapping[str, NDArray[np.float32]]) -> float:
        squares = (np.square(x[k].astype(np.float64) - y[k].astype(np.float64)) for k in x)
        return float(np.sqrt(sum(square.sum() for square in squares)))

    moved = norm(first, start)
    if not moved:
        raise ValueError("the first tree is where it started, so there is nothing to compare")
    return norm(first, second) / moved
