"""The job: run the rounds of a run file, record each, checkpoint each, end with a report.

A round is done when its checkpoint is complete. Its metrics travel inside the checkpoint, so that
a process killed between checkpoint and metrics line loses neither.
"""

import dataclasses
from pathlib import Path
from typing import Any

from fedjax_llm.data import Corpus
from fedjax_llm.federation import Federation, FederationState, processes
from fedjax_llm.models import Model
from fedjax_llm.runs import build, compiled, machine, report, runfile
from fedjax_llm.runs.build import harmonising
from fedjax_llm.runs.events import Note, OnEvent, RoundStarted, Stage, ignore
from fedjax_llm.runs.folder import (
    RunFolder,
    fingerprint,
    forecast_file,
    metrics,
    summary,
    timeline_file,
    virtual,
)
from fedjax_llm.runs.folder.checkpoints import Checkpoints
from fedjax_llm.runs.folder.summary import Summary
from fedjax_llm.runs.folder.tensorboard import TensorBoard
from fedjax_llm.runs.job import auditing, orders, restoring, rounds, stopping
from fedjax_llm.runs.job.orders import Order
from fedjax_llm.runs.job.sample import sample
from fedjax_llm.runs.sections.aggregation import AttackSection
from fedjax_llm.runs.sections.schema import RunFile


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the rounds of a job work with.

    Attributes:
        run_file: what to do.
        folder: where it is kept.
        base: the model.
        corpora: of each cloud.
        federation: of them all.
        identity: what the rounds depend on, as hashes.
        statement: what the run says of its privacy.
        on_event: is told of everything.
    """

    run_file: RunFile
    folder: RunFolder
    base: Model
    corpora: list[Corpus]
    federation: Federation
    identity: fingerprint.Fingerprint
    statement: str
    on_event: OnEvent


def run(run_file: RunFile, folder: RunFolder, *, on_event: OnEvent = ignore) -> Summary:
    """Runs a run file in a folder, from its last complete checkpoint if it has one.

    Args:
        run_file: what to do.
        folder: an open, locked run folder.
        on_event: is told of every stage, round and note.

    Returns:
        The summary, which is also in summary.json and the report.

    Raises:
        UserError: a mistake in data, model or settings, a full disk, or a folder whose rounds ran
            on another model, other data or other settings; every round before is kept.
        Refused: something that would break the run's privacy or security.
    """
    compiled.keep()
    with compiled.FirstRound(on_event) as told:
        job = _begun(run_file, folder, told)
        initial, state = _all_rounds(job)
        return _ended(job, initial, state)


def resume(path: Path, *, on_event: OnEvent = ignore) -> Summary:
    """Continues the run in a folder to its end; a finished one is only reported again."""
    with RunFolder.open(path, write=True) as folder:
        run_file = runfile.load(folder.run_toml)
        result = restoring.finished(run_file, folder)
        if result is None:
            return run(run_file, folder, on_event=on_event)
        orders.give(Order.END)
        on_event(Note(f"all {result.rounds} rounds are done; only the report is made again"))
        on_event(Stage("report"))
        report.write(folder)
        return result


def _begun(run_file: RunFile, folder: RunFolder, on_event: OnEvent) -> _Job:
    """Loads and builds all that the rounds need, and says what the run promises."""
    build.check_devices(run_file)
    build.model_folder(run_file, on_event)  # fetched by this process alone
    orders.give(Order.BEGIN)
    base = build.model(run_file, on_event)
    corpora = build.corpora(run_file, base, on_event)
    harmonising.record(folder, run_file, corpora)
    forecast_file.record(folder, run_file)
    identity = fingerprint.of(run_file, base, corpora)
    orders.check_same(identity, run_file)
    on_event(Stage("sum" if run_file.secure.sum == "plain" else "keys"))
    secret = None
    if build.secret_noise(run_file):
        secret = orders.shared_secret(folder.noise_secret())
    federation = build.federation(run_file, base, corpora, secret)
    identity |= fingerprint.of_timeline(federation.calendar)
    timeline_file.write(folder, federation.calendar, run_file.rounds)
    on_event(Note(federation.statement()))
    statement = harmonising.privacy_statement(federation.plan.statement(), run_file)
    on_event(Note(statement))
    if (words := stopping.statement(run_file)) is not None:
        on_event(Note(words))
    if run_file.attack is not None:
        on_event(Note(_attack_statement(run_file.attack)))
    return _Job(run_file, folder, base, corpora, federation, identity, statement, on_event)


def _all_rounds(job: _Job) -> tuple[FederationState, FederationState]:
    """Runs the rounds that are left; gives the states before the first and after the last."""
    run_file, folder, federation, on_event = job.run_file, job.folder, job.federation, job.on_event
    initial = federation.init()
    checkpoints = Checkpoints(folder.checkpoints, run_file.checkpoint.keep)
    try:
        found = restoring.restored(
            checkpoints, initial, folder, run_file, federation, job.identity, on_event
        )
        kept = restoring.clients_at_once(found, folder, run_file)
        federation.keep_at_once(orders.shared_count(kept))
        state = processes.from_first(initial if found is None else found.tree)
        with TensorBoard(folder.tensorboard, metrics.read(folder.metrics)) as board:
            if found is None:
                on_event(RoundStarted(0, run_file.rounds))
                record = rounds.before_training(federation, initial, on_event)
                begun = {"fingerprint": job.identity, "offline": {}}
                rounds.finish_round(folder, checkpoints, board, initial, record, begun, on_event)
            last = _last_round(job)
            if stopping.reached(run_file, metrics.read(folder.metrics)[-1]):
                last = int(state.round)
            for number in range(int(state.round) + 1, last + 1):
                on_event(RoundStarted(number, last))
                # The state before the first round is read again at the end of the run.
                spare = state is not initial
                state, record = rounds.one_round(
                    folder, federation, run_file, state, number == last, on_event, spare
                )
                metadata: dict[str, Any] = {
                    "fingerprint": job.identity,
                    "offline": restoring.offline(run_file, number),
                    "clients_at_once": {
                        "asked": run_file.training.clients_at_once,
                        "used": federation.clients_at_once,
                    },
                }
                rounds.finish_round(folder, checkpoints, board, state, record, metadata, on_event)
                if stopping.reached(run_file, record):
                    break
    finally:
        checkpoints.close()
    orders.give(Order.END)
    return processes.own((initial, state))


def _last_round(job: _Job) -> int:
    """The last round that the budget of epsilon allows; says so if that is not the last of all."""
    asked, allowed = job.run_file.rounds, job.federation.spending.allowed_steps
    if allowed < asked:
        job.on_event(
            Note(
                f"the budget of epsilon {job.federation.plan.budget:g} is enough for {allowed} of "
                f"{asked} rounds: the run stops there"
            )
        )
    return min(asked, allowed)


def _ended(job: _Job, initial: FederationState, state: FederationState) -> Summary:
    """Audits the run if it asks for that, and writes its summary and report."""
    run_file, folder, federation, on_event = job.run_file, job.folder, job.federation, job.on_event
    if run_file.audit is not None:
        on_event(Stage("audit"))
        auditing.record(folder, run_file, job.base, job.corpora, state, on_event)

    result = summary.summarise(
        metrics.read(folder.metrics),
        name=run_file.name,
        seed=run_file.seed,
        privacy_statement=job.statement,
        secure_statement=federation.statement(),
        sample=sample(run_file, job.base, federation, (initial, state), on_event),
        parameters_trained=federation.parameters,
        encrypted_fraction=federation.encrypted_fraction,
        virtual=virtual.of(federation.calendar, int(state.round)),
        versions=machine.versions(),
        machine=machine.machine(),
    )
    on_event(Stage("report"))
    if int(state.round) < run_file.rounds:
        timeline_file.write(folder, federation.calendar, int(state.round))
    folder.write("summary.json", result.to_json())
    report.write(folder)
    return result


def _attack_statement(attack: AttackSection) -> str:
    scale = "" if attack.name == build.LABEL_FLIP else f" at scale {attack.scale:g}"
    return f"simulated attack: {', '.join(attack.clouds)} do {attack.name}{scale} in every round"
