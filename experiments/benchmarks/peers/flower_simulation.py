"""Flower's simulation: its server, its strategy FedAvg, its Ray workers. Started by run.py.

A worker has `--threads` cores and PyTorch as many threads, so that two cores hold two workers of
one or one of two. The clients train as in flower_client.py.
"""

import os

# Read when the libraries are imported: nothing is sent to anybody, and nothing is drawn.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import flower_client
import flwr
import ray
import torch_lora
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from tasks import TASKS, write_factors
from turns import Turns, arguments


class Recorded(FedAvg):
    """FedAvg that keeps the last round's training loss at hand."""

    loss = float("nan")

    def aggregate_train(self, server_round, replies):
        """As FedAvg."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None or metrics is None:
            raise RuntimeError(f"round {server_round}: Flower got no usable reply of its clients")
        self.loss = float(metrics["loss"])
        return arrays, metrics


def main() -> None:
    """Runs the simulation, each round in its turn."""
    parser = arguments(__doc__.splitlines()[0], list(TASKS))
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of all workers")
    asked = parser.parse_args()
    turns, task = Turns(asked.wait), TASKS[asked.task]
    model = torch_lora.load(task, asked.folder)
    server = ServerApp()

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        strategy = Recorded(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=task.clients,
            min_available_nodes=task.clients,
        )
        started = 0.0

        def between(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            """Flower calls it before the first round and after each."""
            nonlocal started
            if number == 0:
                turns.ready(
                    threads=asked.threads,
                    flwr=flwr.__version__,
                    ray=ray.__version__,
                    **torch_lora.versions(),
                )
            else:
                turns.done(started, strategy.loss)
            if number < asked.rounds:
                started = turns.go()
            return None

        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(torch_lora.values(model)),
            num_rounds=asked.rounds,
            train_config=ConfigRecord(
                {"task": asked.task, "folder": str(asked.folder), "threads": asked.threads}
            ),
            evaluate_fn=between,
        )
        torch_lora.put_values(model, result.arrays.to_numpy_ndarrays())

    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=task.clients,
        backend_config={
            "init_args": {
                "num_cpus": asked.cores,
                "include_dashboard": False,
                "log_to_driver": False,
            },
            "client_resources": {"num_cpus": asked.threads, "num_gpus": 0.0},
        },
    )
    if asked.out:
        write_factors(asked.out, torch_lora.factors(model))
    turns.end()


if __name__ == "__main__":
    main()
