"""The job: run the rounds of a run file, record each, checkpoint each, end with a report.

A round is done when its checkpoint is complete. Its metrics travel inside the checkpoint, so that
a process killed between checkpoint and metrics line loses neither.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fedjax_llm.data import Record, prompt_text
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, FederationState, RoundReport, processes
from fedjax_llm.models import Model, generate
from fedjax_llm.runs import (
    auditing,
    build,
    compiled,
    fingerprint,
    forecast_file,
    harmonising,
    machine,
    metrics,
    opened,
    orders,
    report,
    runfile,
    stopping,
    summary,
    timeline_file,
    virtual,
)
from fedjax_llm.runs.checkpoints import Checkpoints
from fedjax_llm.runs.events import (
    Note,
    OnEvent,
    Progress,
    RoundFinished,
    RoundStarted,
    Stage,
    ignore,
)
from fedjax_llm.runs.folder import RunFolder
from fedjax_llm.runs.metrics import CloudRecord, RoundRecord
from fedjax_llm.runs.orders import Order
from fedjax_llm.runs.runfile import RunFile
from fedjax_llm.runs.runfile_aggregation import AttackSection
from fedjax_llm.runs.summary import Sample, Summary
from fedjax_llm.runs.tensorboard import TensorBoard


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
        return _run(run_file, folder, told)


def _run(run_file: RunFile, folder: RunFolder, on_event: OnEvent) -> Summary:
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
    plan = federation.plan
    on_event(Note(federation.statement()))
    statement = harmonising.privacy_statement(plan.statement(), run_file)
    on_event(Note(statement))
    if (words := stopping.statement(run_file)) is not None:
        on_event(Note(words))
    if run_file.attack is not None:
        on_event(Note(_attack_statement(run_file.attack)))

    initial = federation.init()
    checkpoints = Checkpoints(folder.checkpoints, run_file.checkpoint.keep)
    try:
        found = checkpoints.latest(
            like=initial,
            notify=lambda text: on_event(Note(text)),
            check=lambda saved: fingerprint.check(
                saved.get("fingerprint", {}), identity, folder.path
            ),
        )
        if found is None:
            state = initial
            metrics.truncate(folder.metrics, -1)
        else:
            if found.metadata.get("offline", {}) != _offline(run_file, found.round):
                raise UserError(
                    f"{folder.path}: offline_rounds say something else about the {found.round} "
                    "rounds that were run, and each cloud's epsilon counts them; restore them in "
                    "its run.toml"
                )
            if found.round > run_file.rounds:
                raise UserError(
                    f"{folder.path} has run {found.round} rounds and rounds = {run_file.rounds}; "
                    "its results and epsilon are those of all its rounds: set rounds to at least "
                    f"{found.round}"
                )
            if found.round > federation.spending.allowed_steps:
                raise Refused(
                    f"{folder.path} has spent more than its budget of epsilon {plan.budget:g}: "
                    f"{plan.report(found.round)}; raise [privacy] budget in its run.toml, or stop"
                )
            state = found.tree
            records = metrics.truncate(folder.metrics, found.round)
            if not records or records[-1]["round"] < found.round:
                metrics.append(folder.metrics, cast(RoundRecord, found.metadata["record"]))
            on_event(Note(f"continuing after round {found.round} of {run_file.rounds}"))
        # What fits may have changed since, and with it the bytes of the next rounds.
        kept = opened.clients_at_once(folder, 1 if found is None else found.round + 1)
        before = None if found is None else found.metadata.get("clients_at_once")
        if before is not None and before["asked"] == run_file.training.clients_at_once:
            kept = kept or before["used"]
        federation.keep_at_once(orders.shared_count(kept))
        state = processes.from_first(state)
        with TensorBoard(folder.tensorboard, metrics.read(folder.metrics)) as board:
            if found is None:
                on_event(RoundStarted(0, run_file.rounds))
                record = _before_training(federation, initial, on_event)
                begun = {"fingerprint": identity, "offline": {}}
                _finish_round(folder, checkpoints, board, initial, record, begun, on_event)
            rounds = min(run_file.rounds, federation.spending.allowed_steps)
            if rounds < run_file.rounds:
                on_event(
                    Note(
                        f"the budget of epsilon {plan.budget:g} is enough for {rounds} of "
                        f"{run_file.rounds} rounds: the run stops there"
                    )
                )
            if stopping.reached(run_file, metrics.read(folder.metrics)[-1]):
                rounds = int(state.round)
            for number in range(int(state.round) + 1, rounds + 1):
                on_event(RoundStarted(number, rounds))
                # The state before the first round is read again at the end of the run.
                spare = state is not initial
                state, record = _one_round(
                    folder, federation, run_file, state, number == rounds, on_event, spare
                )
                metadata: dict[str, Any] = {
                    "fingerprint": identity,
                    "offline": _offline(run_file, number),
                    "clients_at_once": {
                        "asked": run_file.training.clients_at_once,
                        "used": federation.clients_at_once,
                    },
                }
                _finish_round(folder, checkpoints, board, state, record, metadata, on_event)
                if stopping.reached(run_file, record):
                    break
    finally:
        checkpoints.close()
    orders.give(Order.END)
    initial, state = processes.own((initial, state))

    if run_file.audit is not None:
        on_event(Stage("audit"))
        auditing.record(folder, run_file, base, corpora, state, on_event)

    result = summary.summarise(
        metrics.read(folder.metrics),
        name=run_file.name,
        seed=run_file.seed,
        privacy_statement=statement,
        secure_statement=federation.statement(),
        sample=_sample(run_file, base, federation, (initial, state), on_event),
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


def resume(path: Path, *, on_event: OnEvent = ignore) -> Summary:
    """Continues the run in a folder to its end; a finished one is only reported again."""
    with RunFolder.open(path, write=True) as folder:
        run_file = runfile.load(folder.run_toml)
        result = _finished(run_file, folder)
        if result is None:
            return run(run_file, folder, on_event=on_event)
        orders.give(Order.END)
        on_event(Note(f"all {result.rounds} rounds are done; only the report is made again"))
        on_event(Stage("report"))
        report.write(folder)
        return result


def _offline(run_file: RunFile, rounds: int) -> dict[str, list[int]]:
    """The rounds, of those that were run, in which clouds were offline."""
    missed = {
        cloud.name: sorted(number for number in cloud.offline_rounds if number <= rounds)
        for cloud in run_file.clouds
    }
    return {name: numbers for name, numbers in missed.items() if numbers}


def _attack_statement(attack: AttackSection) -> str:
    scale = "" if attack.name == build.LABEL_FLIP else f" at scale {attack.scale:g}"
    return f"simulated attack: {', '.join(attack.clouds)} do {attack.name}{scale} in every round"


def _finished(run_file: RunFile, folder: RunFolder) -> Summary | None:
    """The summary of a run that has nothing left to do; it needs neither model nor keys."""
    try:
        result = summary.read(folder.summary)
    except UserError:
        return None  # damaged; the run writes it again
    return result if result is not None and stopping.ended(run_file, result) else None


def _before_training(
    federation: Federation, state: FederationState, on_event: OnEvent
) -> RoundRecord:
    on_event(Progress(0, 1, "evaluate"))
    started = time.perf_counter()
    orders.give(Order.EVALUATE)
    losses = federation.evaluate(state)
    seconds = time.perf_counter() - started
    on_event(Progress(1, 1, "evaluate"))
    return RoundRecord(
        round=0,
        loss_eval_nats=_mean(list(losses.values())),
        seconds_evaluate=seconds,
        seconds_round=seconds,
        clouds={name: CloudRecord(loss_eval_nats=value) for name, value in losses.items()},
    )


def _one_round(
    folder: RunFolder,
    federation: Federation,
    run_file: RunFile,
    state: FederationState,
    last: bool,
    on_event: OnEvent,
    spare: bool,
) -> tuple[FederationState, RoundRecord]:
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
    record = _record(done, losses, federation)
    record["seconds_evaluate"] = seconds_evaluate
    record["seconds_round"] = time.perf_counter() - started
    return state, record


def epsilon_by_cloud(federation: Federation, rounds: int) -> dict[str, float]:
    """The epsilon of each cloud after so many rounds, the largest of its clients; {} without.

    A cloud that was offline in a round, or takes fewer local steps, has spent less.
    """
    plan, found = federation.plan, dict[str, float]()
    spending = federation.spending
    taken = spending.local_steps(rounds)
    epsilons = plan.epsilon_per_cloud(spending.rounds(rounds), taken) or ()
    for participant, epsilon in zip(federation.participants, epsilons, strict=bool(epsilons)):
        name = participant.cloud.name
        found[name] = max(found.get(name, 0.0), epsilon)
    return found


def _record(done: RoundReport, losses: dict[str, float], federation: Federation) -> RoundRecord:
    plan = federation.plan
    spent = plan.report(federation.spending.rounds(done.round))
    per_cloud = epsilon_by_cloud(federation, done.round)
    clouds: dict[str, CloudRecord] = {}
    for name, cloud in done.clouds.items():
        clouds[name] = CloudRecord(
            loss_train_nats=cloud.loss_train_nats,
            examples=cloud.rows,
            uplink_bytes=cloud.uplink_bytes,
            downlink_bytes=cloud.downlink_bytes,
            seconds_link=cloud.seconds_link,
            seconds_train_virtual=cloud.seconds_train,
            dollars=cloud.dollars,
            lands=cloud.lands,
        )
        if name in losses:
            clouds[name]["loss_eval_nats"] = losses[name]
        if spent.epsilon is None:
            clouds[name]["epsilon_reason"] = spent.reason or ""
        elif plan.unit == "client" and len(federation.participants) > len(done.clouds):
            clouds[name]["epsilon_reason"] = "the unit is one client of a cloud, not the cloud"
        else:
            clouds[name]["epsilon"] = per_cloud.get(name, spent.epsilon)
    record = RoundRecord(
        round=done.round,
        loss_train_nats=done.loss_train_nats,
        epsilon=spent.epsilon,
        delta=spent.delta,
        uplink_bytes=done.uplink_bytes,
        downlink_bytes=done.downlink_bytes,
        seconds_train=done.seconds["train"],
        seconds_encrypt=done.seconds["encrypt"],
        seconds_add=done.seconds["add"],
        seconds_decrypt=done.seconds["decrypt"],
        seconds_virtual=done.seconds_virtual,
        dollars=done.dollars,
        dollars_server=done.dollars_server,
        tokens=done.tokens,
        tokens_per_second=done.tokens / done.seconds["train"],
        update_norm=done.update_norm,
        aggregation_error=done.aggregation_error,
        clipped_fraction=done.clipped_fraction,
        clouds_diverged=done.clouds_diverged,
        clouds=clouds,
    )
    if spent.reason is not None:
        record["epsilon_reason"] = spent.reason
    if losses:
        record["loss_eval_nats"] = _mean(list(losses.values()))
    return record


def _finish_round(
    folder: RunFolder,
    checkpoints: Checkpoints,
    board: TensorBoard,
    state: FederationState,
    record: RoundRecord,
    metadata: Mapping[str, Any],
    on_event: OnEvent,
) -> None:
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


def _sample(
    run_file: RunFile,
    base: Model,
    federation: Federation,
    states: Sequence[FederationState],
    on_event: OnEvent,
) -> Sample | None:
    """One answer of the model as it was and as it has become; of the first cloud's, if it differs.

    Args:
        run_file: holds the prompt.
        base: the model.
        federation: says what a state's model is.
        states: before and after.
        on_event: is told.
    """
    prompt = run_file.evaluation.prompt
    if prompt is None:
        return None
    on_event(Stage("answer", prompt))
    training, tokenizer = run_file.training, base.tokenizer
    record = Record(prompt=prompt, answer="")
    ids = tokenizer.encode(
        prompt_text(record, tokenizer, training.template, training.system_prompt)
    )
    answers = []
    for state in states:
        weights, adapter = federation.model_of(state, federation.names[0])
        trained = dataclasses.replace(base, base=weights)
        tokens = generate(trained, adapter, ids, run_file.evaluation.max_new_tokens)
        answers.append(tokenizer.decode(tokens).strip())
    return Sample(prompt, *answers)


def _mean(losses: Sequence[float]) -> float:
    """Unweighted over clouds: each counts once, whatever it holds."""
    return sum(losses) / len(losses)
