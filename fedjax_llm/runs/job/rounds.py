"""One round of a job: run, recorded, checkpointed."""

import time
from collections.abc import Mapping
from typing import Any

from fedjax_llm.federation import Federation, FederationState
from fedjax_llm.runs.events import Note, OnEvent, Progress, RoundFinished
from fedjax_llm.runs.folder import RunFolder, metrics, opened
from fedjax_llm.runs.folder.checkpoints import Checkpoints
from fedjax_llm.runs.folder.metrics import CloudRecord, RoundRecord
from fedjax_llm.runs.folder.tensorboard import TensorBoard
from fedjax_llm.runs.job import orders, records
from fedjax_llm.runs.job.orders import Order
from fedjax_llm.runs.sections.schema import RunFile


def before_training(
    federation: Federation, state: FederationState, on_event: OnEvent
) -> RoundRecord:
    """Evaluates the state before the first round; its record is that of round 0."""
    on_event(Progress(0, 1, "evaluate"))
    started = time.perf_counter()
    orders.give(Order.EVALUATE)
    losses = federation.evaluate(state)
    seconds = time.perf_counter() - started
    on_event(Progress(1, 1, "evaluate"))
    return RoundRecord(
        round=0,
        loss_eval_nats=records.mean(list(losses.values())),
        seconds_evaluate=seconds,
        seconds_round=seconds,
        clouds={name: CloudRecord(loss_eval_nats=value) for name, value in losses.items()},
    )


def one_round(
    folder: RunFolder,
    federation: Federation,
    run_file: RunFile,
    state: FederationState,
    last: bool,
    on_event: OnEvent,
    spare: bool,
) -> tuple[FederationState, RoundRecord]:
    """Runs the next round, and evaluates it if it is due or the last; gives the state after it.

    With `spare` the state before it may be overwritten.
    """
    stages = ("train", "encrypt", "decrypt", "evaluate")
    started, before = time.perf_counter(), federation.clients_at_once
    orders.give(Order.ROUND)
    state, done = federation.run_round(
        state,
        on_stage=lambda stage: on_event(Progress(stages.index(stage), len(stages), stage)),
        before_opening=lambda what: opened.record(folder, what, federation.clients_at_once),
        donate=spare,
    )
    if done.clients_at_once != before:
        on_event(Note(f"{done.clients_at_once} clients run at once on a device, {before} before"))
    losses: dict[str, float] = {}
    seconds_evaluate = 0.0
    if last or done.round % run_file.evaluation.every_rounds == 0:
        on_event(Progress(3, len(stages), "evaluate"))
        evaluating = time.perf_counter()
        orders.give(Order.EVALUATE)
        losses = federation.evaluate(state)
        seconds_evaluate = time.perf_counter() - evaluating
    on_event(Progress(len(stages), len(stages), "evaluate"))
    record = records.of_round(done, losses, federation)
    record["seconds_evaluate"] = seconds_evaluate
    record["seconds_round"] = time.perf_counter() - started
    return state, record


def finish_round(
    folder: RunFolder,
    checkpoints: Checkpoints,
    board: TensorBoard,
    state: FederationState,
    record: RoundRecord,
    metadata: Mapping[str, Any],
    on_event: OnEvent,
) -> None:
    """Keeps a round: its checkpoint, which makes it done, then its record wherever it is shown."""
    started = time.perf_counter()
    saved = {"record": metrics.strict(record), **metadata}
    checkpoints.save(record["round"], state, saved)
    record["seconds_checkpoint"] = time.perf_counter() - started
    record["seconds_round"] += record["seconds_checkpoint"]
    metrics.append(folder.metrics, record)
    board.add(record)
    on_event(RoundFinished(record))
    if record.get("clouds_diverged"):
        on_event(
            Note(
                f"round {record['round']}: {record['clouds_diverged']} updates were not finite and "
                "entered the sum as zeros; lower [training] learning_rate"
            )
        )
