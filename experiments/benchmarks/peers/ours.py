"""Our side: `fedjax_llm.federation.Federation`, factor averaging, plain sum. Started by run.py.

As a user would run a simulation without a run file. The clients are spread over at most eight
clouds. `--threads` does not reach it: XLA takes the cores that the process may use.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import TASKS, Task, model_folder, read_factors, read_tokens, write_factors
from turns import Turns, arguments

from fedjax_llm.aggregation import FactorAveraging
from fedjax_llm.clouds import Cloud, Link
from fedjax_llm.federation import Federation, FederationState, Participant, Plain
from fedjax_llm.federation.virtual import flops_per_token
from fedjax_llm.lora import LoraConfig, LowRank
from fedjax_llm.models import Batch, Model
from fedjax_llm.models.checkpoint import read_base
from fedjax_llm.models.model import load_config
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import LocalTraining
from fedjax_llm_kernels import choice

CLOUDS = 8
# Those of a round without privacy that have a form in Pallas.
KERNELS = ("attention", "cross_entropy", "many_adapters")
# A message is shortened to it; a round in which one was longer is an error.
BOUND = 8.0
# Of float32: fixed point that is as fine is no difference from sides that add floats.
FINEST_BITS = 24


def participants(task: Task, folder: Path) -> list[Participant]:
    """The clients with their rows; all tokens are real, and all but the first are answers."""
    link = Link(up_mbps=1000.0, down_mbps=1000.0, latency_ms=1.0)
    clouds = [Cloud(f"cloud-{c}", link) for c in range(min(CLOUDS, task.clients))]

    def one(client: int, tokens_BxT: np.ndarray) -> Participant:
        everywhere = np.ones(tokens_BxT.shape, bool)
        rows = Batch(np.asarray(tokens_BxT), everywhere, everywhere.astype(np.int32))
        evaluation = jax.tree.map(lambda leaf: leaf[:1], rows)
        cloud = clouds[client * len(clouds) // task.clients]
        return Participant(cloud, rows, evaluation, client=f"client-{client}")

    return [one(client, tokens) for client, tokens in enumerate(read_tokens(folder))]


def federate(task: Task, folder: Path, rounds: int, **settings: Any) -> Federation:
    """The federation of a task; `settings` are other arguments of `Federation`."""
    config = load_config(model_folder(folder))
    # No tokenizer: the rows are tokens already.
    base = read_base(model_folder(folder), config, dtype=task.dtype)
    model = Model(config, base, None, model_folder(folder))  # type: ignore[arg-type]
    return Federation(
        model,
        participants(task, folder),
        lora=LoraConfig(rank=task.rank, alpha=task.alpha, targets=("all-linear",)),
        training=LocalTraining(optax.sgd(task.learning_rate), task.steps, task.batch, task.batch),
        rule=FactorAveraging(optax.sgd(1.0)),
        plan=PrivacyPlan.without_privacy(rounds, task.steps),
        sum_mode=Plain(),
        update_bound=BOUND,
        # As many as a sum over all clients has room for in 32 bits.
        value_bits=min(FINEST_BITS, 31 - (task.clients - 1).bit_length()),
        measure_error=False,
        seed=task.seed,
        dtype=task.dtype,
        **settings,
    )


def start(federation: Federation, folder: Path) -> FederationState:
    """The state before the first round, with the adapter that everybody starts from."""
    state, factors = federation.init(), read_factors(folder / "start.npz")
    adapter = state.server.adapter
    ours = {
        name: LowRank(*(jnp.asarray(factors[f"{name}.{side}"]) for side in "ab"))
        for name in adapter.factors
    }
    for name, pair in adapter.factors.items():
        if jax.tree.map(jnp.shape, pair) != jax.tree.map(jnp.shape, ours[name]):
            raise ValueError(f"{folder}: the stored adapter of {name} has other shapes than ours")
    adapter = type(adapter)(ours, adapter.scale)
    return state._replace(server=state.server._replace(adapter=adapter))


def model_flops(federation: Federation, state: FederationState, task: Task) -> float:
    """Floating-point operations that a round needs, by the shapes: `clouds.training_flops`.

    What is computed again in the backward pass (`--remat`) does not count, nor what a triangle of
    attention that is masked costs who computes it.
    """
    each = flops_per_token(federation.model, state.server.adapter, task.length, remat=False)
    return task.tokens * each


def main(leads: bool = True) -> None:
    """Builds, then trains a round a turn; of several processes one `leads`, and writes."""
    parser = arguments(__doc__.splitlines()[0], list(TASKS))
    parser.add_argument("--unroll", type=int, default=1, help="layers compiled in a row")
    parser.add_argument("--remat", action="store_true", help="compute activations twice")
    parser.add_argument("--at-once", type=int, help="clients; as many as fit if not given")
    parser.add_argument("--devices", type=int, help="how many to use; all if not given")
    parser.add_argument(
        "--pallas", nargs="+", choices=KERNELS, default=[], help="kernels that take this form"
    )
    asked = parser.parse_args()
    # Before anything is traced, which is when the table is asked.
    kind = jax.devices()[0].device_kind
    choice.BEST = {**choice.BEST, **{(kernel, kind): "pallas" for kernel in asked.pallas}}
    turns, task = Turns(asked.wait), TASKS[asked.task]
    devices = jax.devices()[: asked.devices]
    federation = federate(
        task,
        asked.folder,
        asked.rounds,
        unroll=asked.unroll,
        remat=asked.remat,
        clients_at_once=asked.at_once,
        devices=devices,
    )
    state = start(federation, asked.folder)
    turns.ready(
        jax=jax.__version__,
        devices=len(devices),
        group=federation.layout.group,
        flops=model_flops(federation, state, task),
    )
    for _ in range(asked.rounds):
        started = turns.go()
        state, report = federation.run_round(state, donate=True)
        jax.block_until_ready(state)
        if report.clipped_fraction or not math.isfinite(report.loss_train_nats or math.nan):
            raise RuntimeError(f"round {report.round}: a message was shortened to {BOUND}")
        turns.done(started, report.loss_train_nats or math.nan, program=report.seconds["train"])
    if asked.out and leads:
        adapter = state.server.adapter
        pairs = {name: zip("ab", pair, strict=True) for name, pair in adapter.factors.items()}
        write_factors(
            asked.out,
            {f"{name}.{side}": np.asarray(f) for name, pair in pairs.items() for side, f in pair},
        )
    turns.end()


if __name__ == "__main__":
    main()
