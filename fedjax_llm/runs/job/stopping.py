"""When a run ends before its last round: its held-out loss has reached [evaluation] target_loss.

The loss is the mean over the clouds, each counting once, of a round that was evaluated. Held-out
rows are no part of what epsilon covers; a run that ends by them tells about them.
"""

from fedjax_llm.runs.folder.metrics import RoundRecord
from fedjax_llm.runs.folder.summary import Summary
from fedjax_llm.runs.sections.schema import RunFile


def reached(run_file: RunFile, record: RoundRecord) -> bool:
    """Whether the run ends after this round; never before the first."""
    target, loss = run_file.evaluation.target_loss, record.get("loss_eval_nats")
    return record["round"] > 0 and target is not None and loss is not None and loss <= target


def ended(run_file: RunFile, result: Summary) -> bool:
    """Whether a result is that of a whole run: all its rounds, or as many as its target took."""
    if result.rounds == run_file.rounds:
        return True
    losses = [cloud.loss_after_nats for cloud in result.clouds.values()]
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses) or not known:
        return False
    mean = sum(known) / len(known)
    return reached(run_file, RoundRecord(round=result.rounds, loss_eval_nats=mean))


def statement(run_file: RunFile) -> str | None:
    """What a run says of its end before it starts; None without a target."""
    target = run_file.evaluation.target_loss
    if target is None:
        return None
    words = (
        f"the run ends after the first round whose held-out loss, the mean over the clouds, is at "
        f"most {target:g}"
    )
    if run_file.privacy.unit != "none":
        words += "; when that is tells about held-out rows, which epsilon does not cover"
    return words
