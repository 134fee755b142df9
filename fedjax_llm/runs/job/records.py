"""What a round did, as a record of metrics.jsonl."""

from collections.abc import Sequence

from fedjax_llm.federation import Federation, RoundReport
from fedjax_llm.runs.folder.metrics import CloudRecord, RoundRecord


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


def of_round(done: RoundReport, losses: dict[str, float], federation: Federation) -> RoundRecord:
    """The record of a round: its report, what it has spent, and losses where it was evaluated."""
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
        record["loss_eval_nats"] = mean(list(losses.values()))
    return record


def mean(losses: Sequence[float]) -> float:
    """Unweighted over clouds: each counts once, whatever it holds."""
    return sum(losses) / len(losses)
