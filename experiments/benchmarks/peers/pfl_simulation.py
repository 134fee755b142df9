"""pfl-research's simulation: its backend, its FederatedAveraging, its PyTorch model. By run.py."""

from pathlib import Path

import numpy as np
import pfl
import torch
import torch_lora
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from tasks import TASKS, Task, read_tokens, write_factors
from turns import Turns, arguments


class Trained(torch.nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[torch.Tensor] = []

    def loss(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, kept until somebody asks."""
        loss = self.model(input_ids=tokens_BxT, labels=tokens_BxT).loss
        self.losses.append(loss.detach().clone())
        return loss

    @torch.no_grad()
    def metrics(self, tokens_BxT: torch.Tensor) -> dict:
        """For evaluation, which pfl does in the first round whatever it is asked for."""
        loss = float(self.model(input_ids=tokens_BxT, labels=tokens_BxT).loss)
        return {"loss": Weighted(loss * len(tokens_BxT), len(tokens_BxT))}


class InTurns(TrainingProcessCallback):
    """Waits for each round's turn and tells what it came to."""

    def __init__(self, turns: Turns, module: Trained, rounds: int, head: dict) -> None:
        self._turns, self._module, self._rounds, self._head = turns, module, rounds, head
        self._started = 0.0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Before the first round."""
        self._turns.ready(**self._head)
        self._started = self._turns.go()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """After each."""
        losses, self._module.losses = self._module.losses, []
        self._turns.done(self._started, float(torch.stack(losses).mean()))
        if central_iteration + 1 < self._rounds:
            self._started = self._turns.go()
        return False, Metrics()


def clients(task: Task, folder: Path) -> FederatedDataset:
    """A dataset for each client, their rows in memory."""
    tokens_KxBxT = torch.from_numpy(np.array(read_tokens(folder), np.int64))
    users = {user: Dataset((rows,), user_id=str(user)) for user, rows in enumerate(tokens_KxBxT)}
    return FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))


def main() -> None:
    """Loads, then trains a round a turn."""
    asked = arguments(__doc__.splitlines()[0], list(TASKS)).parse_args()
    turns, task = Turns(asked.wait), TASKS[asked.task]
    torch.set_num_threads(asked.threads)
    model = torch_lora.load(task, asked.folder)
    module = Trained(model)
    data = clients(task, asked.folder)
    head = {"threads": asked.threads, "pfl": pfl.__version__, **torch_lora.versions()}
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=asked.rounds,
            evaluation_frequency=asked.rounds + 1,
            train_cohort_size=task.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        PyTorchModel(
            module,
            lambda parameters, lr: torch.optim.SGD(torch_lora.trained(model), lr=lr),
            torch.optim.SGD(torch_lora.trained(model), lr=1.0),
        ),
        NNTrainHyperParams(
            local_batch_size=task.batch,
            local_num_epochs=task.steps,
            local_learning_rate=task.learning_rate,
        ),
        callbacks=[InTurns(turns, module, asked.rounds, head)],
    )
    if asked.out:
        write_factors(asked.out, torch_lora.factors(model))
    turns.end()


if __name__ == "__main__":
    main()
