"""Where a job goes on: its last complete checkpoint, if what its rounds promised still holds."""

from typing import cast

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import Federation, FederationState
from fedjax_llm.runs.events import Note, OnEvent
from fedjax_llm.runs.folder import RunFolder, fingerprint, metrics, opened, summary
from fedjax_llm.runs.folder.checkpoints import Checkpoint, Checkpoints
from fedjax_llm.runs.folder.metrics import RoundRecord
from fedjax_llm.runs.folder.summary import Summary
from fedjax_llm.runs.job import stopping
from fedjax_llm.runs.sections.schema import RunFile


def restored(
    checkpoints: Checkpoints,
    initial: FederationState,
    folder: RunFolder,
    run_file: RunFile,
    federation: Federation,
    identity: fingerprint.Fingerprint,
    on_event: OnEvent,
) -> Checkpoint | None:
    """The checkpoint to go on from, with metrics.jsonl cut to it; None before the first.

    Args:
        checkpoints: of the folder.
        initial: the state before the first round, for its shape.
        folder: the run folder.
        run_file: the settings as they are now.
        federation: built from them.
        identity: what the rounds depend on, as it is now.
        on_event: is told from where the run goes on.

    Raises:
        UserError: another model, other data or settings; fewer rounds asked for than were run.
        Refused: the budget of epsilon is spent already.
    """
    found = checkpoints.latest(
        like=initial,
        notify=lambda text: on_event(Note(text)),
        check=lambda saved: fingerprint.check(saved.get("fingerprint", {}), identity, folder.path),
    )
    if found is None:
        metrics.truncate(folder.metrics, -1)
        return None
    if found.metadata.get("offline", {}) != offline(run_file, found.round):
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
        plan = federation.plan
        raise Refused(
            f"{folder.path} has spent more than its budget of epsilon {plan.budget:g}: "
            f"{plan.report(found.round)}; raise [privacy] budget in its run.toml, or stop"
        )
    records = metrics.truncate(folder.metrics, found.round)
    if not records or records[-1]["round"] < found.round:
        metrics.append(folder.metrics, cast(RoundRecord, found.metadata["record"]))
    on_event(Note(f"continuing after round {found.round} of {run_file.rounds}"))
    return found


def clients_at_once(found: Checkpoint | None, folder: RunFolder, run_file: RunFile) -> int | None:
    """How many clients ran at once before, if the run file asks for the same; None leaves it open.

    What fits may have changed since, and with it the bytes of the next rounds.
    """
    kept = opened.clients_at_once(folder, 1 if found is None else found.round + 1)
    before = None if found is None else found.metadata.get("clients_at_once")
    if before is not None and before["asked"] == run_file.training.clients_at_once:
        kept = kept or before["used"]
    return kept


def offline(run_file: RunFile, rounds: int) -> dict[str, list[int]]:
    """The rounds, of those that were run, in which clouds were offline."""
    missed = {
        cloud.name: sorted(number for number in cloud.offline_rounds if number <= rounds)
        for cloud in run_file.clouds
    }
    return {name: numbers for name, numbers in missed.items() if numbers}


def finished(run_file: RunFile, folder: RunFolder) -> Summary | None:
    """The summary of a run that has nothing left to do; it needs neither model nor keys."""
    try:
        result = summary.read(folder.summary)
    except UserError:
        return None  # damaged; the run writes it again
    return result if result is not None and stopping.ended(run_file, result) else None
