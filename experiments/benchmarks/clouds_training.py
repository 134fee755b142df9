"""What needs training: bytes, and virtual time, until a run has reached a loss.

The run files are those of experiments/cross_cloud. The loss is the mean over the clouds of their
held-out loss in nats per answer token, after every round; bytes are those that the rounds' reports
record, both ways, keys and decryption included.
"""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
from table import Row, row

from fedjax_llm.federation import Federation
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.events import ignore

RUNS = Path(__file__).resolve().parents[1] / "cross_cloud"
# Bars: bytes over those of the baselines, and virtual time over that without the slow cloud.
OF_DATA_PARALLEL, OF_FEDAVG = 1 / 100, 1 / 8
SLOWER, MOST_TIME = 100.0, 1.3
FLOAT32 = 4


class Point(NamedTuple):
    """A run after a round.

    Attributes:
        round: from 1.
        loss: nats per answer token, held out.
        bytes: both ways, all clouds, so far.
        seconds: virtual, so far.
        dollars: so far.
    """

    round: int
    loss: float
    bytes: int
    seconds: float
    dollars: float


class Job:
    """A run file with its model and data loaded, for runs that differ in a few keys."""

    def __init__(self, name: str) -> None:
        self.file = runfile.load(RUNS / f"{name}.toml")
        self.model = build.model(self.file, ignore)
        self.data = build.corpora(self.file, self.model, ignore)

    def federation(self, **changes: Any) -> Federation:
        """With whole sections of the run file replaced."""
        file = self.file.model_copy(update=changes)
        kept = [cloud.name for cloud in file.clouds]
        data = [corpus for corpus in self.data if corpus.name in kept]
        return build.federation(file, self.model, data)


def trace(
    federation: Federation, reach: float = -math.inf, judge: Federation | None = None
) -> list[Point]:
    """The points of a run, until its loss is `reach` or its rounds are over.

    Args:
        federation: of the run.
        reach: nats.
        judge: whose evaluation rows count; its own if None.
    """
    state, points = federation.init(), [Point(0, math.nan, 0, 0.0, 0.0)]
    for _ in range(federation.steps):
        state, report = federation.run_round(state)
        last = points[-1]
        points.append(
            Point(
                report.round,
                statistics.mean((judge or federation).evaluate(state).values()),
                last.bytes + report.uplink_bytes + report.downlink_bytes,
                last.seconds + report.seconds_virtual,
                last.dollars + report.dollars,
            )
        )
        print(f"  {federation.schedule.name}: {points[-1]}", flush=True)
        if points[-1].loss <= reach:
            break
    return points[1:]


def bytes_to_loss() -> list[Row]:
    """Bytes until each run has the loss with which plain federated averaging ends.

    Ours runs under the sum of its run file. Its bytes under the other are counted in a round that
    is really run under it; the integers of both sums, and so the losses, are the same.
    """
    fedavg = trace(Job("fedavg").federation())
    target = fedavg[-1].loss
    parallel = trace(Job("data_parallel").federation(), target)
    job = Job("compressed")
    federation = job.federation()
    ours = trace(federation, target)
    # As run, and so its epsilon, where it ends early.
    epsilon = federation.plan.report(federation.spending.rounds(len(ours))).epsilon
    assert epsilon is not None, "the run file gives every example an epsilon"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.model.base))
    whole = 2 * FLOAT32 * parameters * len(job.file.clouds) * len(parallel)
    rows = [
        row("bytes: target, the final loss of FedAvg", target, "nats"),
        row("bytes: FedAvg, both factors, float32, rounds", len(fedavg), ""),
        row("bytes: FedAvg", fedavg[-1].bytes / 1e6, "MB"),
        row("bytes: data parallel, float32, steps", len(parallel), ""),
        row("bytes: data parallel, loss reached", parallel[-1].loss, "nats"),
        row("bytes: data parallel", parallel[-1].bytes / 1e6, "MB"),
        row("bytes: data parallel of the whole model, as many steps", whole / 1e6, "MB"),
        row("bytes: ours, epsilon of an example", epsilon, ""),
        row("bytes: ours, rounds", len(ours), ""),
        row("bytes: ours, loss reached", ours[-1].loss, "nats"),
    ]
    # A run that does not reach the loss would have to send without end.
    reached = 1.0 if ours[-1].loss <= target else math.inf
    for kind in ("masked", "threshold"):
        own = kind == job.file.secure.sum
        sent = ours[-1].bytes if own else len(ours) * _bytes_of_a_round(job, kind)
        rows.append(row(f"bytes: ours, {kind}", sent / 1e6, "MB"))
        over: tuple[tuple[str, float, float | None], ...] = (
            ("FedAvg", fedavg[-1].bytes, OF_FEDAVG),
            ("data parallel", parallel[-1].bytes, OF_DATA_PARALLEL),
            ("data parallel of the whole model", whole, None),
        )
        for other, base, bar in over:
            rows.append(row(f"bytes: ours, {kind}, over {other}", reached * sent / base, "", bar))
    return rows


def _bytes_of_a_round(job: Job, kind: str) -> int:
    """Both ways, of a first round that is run under another sum."""
    federation = job.federation(
        secure=job.file.secure.model_copy(update={"sum": kind}),
        # What is sent does not depend on how long was trained.
        training=job.file.training.model_copy(update={"local_steps": 1, "batch_size": 1}),
    )
    _, report = federation.run_round(federation.init())
    return report.uplink_bytes + report.downlink_bytes


def slow_link() -> list[Row]:
    """Virtual time to FedAvg's loss with a link that is 100 times slower, over that without it.

    The three corpora are dealt evenly: two clouds alone do not reach the loss where the third is
    the only one to have a domain, and there would be nothing to compare with. The slow cloud is the
    one that has the slowest link before. Without it the other two train alone, synchronously, and
    are judged on the held-out rows of all three, as all runs are.

    With it, a synchronous run learns what it did before, later.
    """
    job = Job("slow_link")
    judge = job.federation()
    fedavg = trace(judge)
    clouds, target = job.file.clouds, fedavg[-1].loss
    place = min(range(len(clouds)), key=lambda k: clouds[k].link.up_mbps or math.inf)
    name, link = clouds[place].name, clouds[place].link
    slow = link.model_copy(
        update={
            "up_mbps": (link.up_mbps or math.nan) / SLOWER,
            "down_mbps": (link.down_mbps or math.nan) / SLOWER,
        }
    )
    slowed = tuple(
        cloud.model_copy(update={"link": slow}) if cloud.name == name else cloud for cloud in clouds
    )
    others = tuple(cloud for cloud in clouds if cloud.name != name)
    rounds = 6 * job.file.rounds  # at most; a run ends at the target
    buffered = job.file.schedule.model_copy(update={"name": "buffered", "size": len(others)})
    runs = {
        "synchronous without it": (others, job.file.schedule),
        "buffered with it": (slowed, buffered),
    }
    waiting = job.federation(clouds=slowed).calendar.timeline
    seconds = {"synchronous with it": waiting.steps[len(fedavg) - 1].ready}
    rows = [
        row("slow link: target", target, "nats"),
        row("slow link: synchronous with it", seconds["synchronous with it"], "s"),
        row("slow link: synchronous with it, steps", len(fedavg), ""),
    ]
    for what, (own, schedule) in runs.items():
        federation = job.federation(clouds=own, schedule=schedule, rounds=rounds)
        points = trace(federation, target, judge)
        # Without the target, the two alone have taken at least this long, so that what is over it
        # is at most what is printed; a run with the slow cloud has failed.
        reached = points[-1].loss <= target or what == "synchronous without it"
        seconds[what] = points[-1].seconds if reached else math.inf
        rows += [
            row(f"slow link: {what}", seconds[what], "s"),
            row(f"slow link: {what}, steps", len(points), ""),
            row(f"slow link: {what}, loss reached", points[-1].loss, "nats"),
        ]
    without = seconds["synchronous without it"]
    return [
        *rows,
        row("slow link: synchronous over without", seconds["synchronous with it"] / without, "x"),
        row(
            "slow link: buffered over without",
            seconds["buffered with it"] / without,
            "x",
            MOST_TIME,
        ),
    ]
