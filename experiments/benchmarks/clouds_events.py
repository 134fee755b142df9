"""What needs no training: the speed of the event simulation, and goodput where clouds fail.

Both take their clouds from the same profiles as a run does; only bytes and seconds of a local step
are given here instead of following from a model.
"""

import itertools
import statistics
import time
from collections.abc import Sequence

from table import Row, row

from fedjax_llm.clouds import Cloud, Failures, Link
from fedjax_llm.clouds.intervals import goodput
from fedjax_llm.clouds.schedules import (
    Deadline,
    Decoupled,
    FedBuff,
    Schedule,
    Streaming,
    Synchronous,
)
from fedjax_llm.clouds.site import Opening, Site, Size

CLIENTS, ROUNDS = 10_000, 100
MOST_SECONDS = 10.0
# A message of the quickstart under threshold encryption, and what answering for a sum takes.
MESSAGE, ANSWER = Size(70_000, 560_000), Size(1_000, 140_000)
LOCAL_STEPS = 4

FAILING = 0.1  # of the time, each cloud
LEAST_GOODPUT = 0.85
CLOUDS, HOLDERS = 4, 2
STEP_SECONDS = (14.0, 15.0, 16.0, 18.0)  # of a local step, by cloud; a cycle takes four
REPAIR_MINUTES = (5.0, 30.0, 120.0)
SERVER_STEPS, SEEDS = 4000, 5


def sites(
    clouds: int, step_seconds: Sequence[float], seed: int, jitter_ms: float, mtbf_s: float | None
) -> list[Site]:
    """Clouds with links of 5 to 65 Mbps; those that fail do so a tenth of the time."""
    found = []
    for k in range(clouds):
        link = Link(5.0 + 10.0 * (k % 7), 50.0, latency_ms=40.0, jitter_ms=jitter_ms)
        cloud = Cloud(f"cloud-{k}", link).seeded(seed)
        presence = None
        if mtbf_s is not None:
            mttr_s = mtbf_s * FAILING / (1 - FAILING)
            presence = Failures(mtbf_s, mttr_s, seed, cloud.name)
        up, down = cloud.link.up.finish, cloud.link.down.finish
        own = step_seconds[k % len(step_seconds)]
        found.append(Site(cloud.name, k, down, up, own, LOCAL_STEPS, [MESSAGE], presence=presence))
    return found


def overhead(repeats: int) -> list[Row]:
    """Seconds of the processor for the events of 10,000 clients in 100 rounds.

    The simulation runs on one core and waits for nothing: on a machine without other work these are
    the seconds of the clock as well.
    """
    speeds = [1.0 + 0.2 * k for k in range(11)]
    schedules: list[Schedule] = [
        Synchronous(),
        Deadline(seconds=20.0, quorum=CLIENTS // 2),
        FedBuff(size=CLIENTS // 2),
        Streaming(fragments=2, overlap=True),
        Decoupled(quorum=CLIENTS // 2, fragments=2),
    ]
    rows = []
    kinds = {"": (0.0, None), " with jitter and failures": (1.0, 3600.0)}
    for (kind, profile), schedule in itertools.product(kinds.items(), schedules):
        seconds, cycles = [], 0
        for _ in range(repeats):
            clients = sites(CLIENTS, speeds, 0, *profile)
            started = time.process_time()
            cycles = len(schedule.simulate(clients, ROUNDS).table_M)
            seconds.append(time.process_time() - started)
        name = f"overhead, {schedule.name}{kind}: {cycles:,} cycles of 10,000 clients"
        rows.append(row(name, statistics.median(seconds), "s", MOST_SECONDS))
    return rows


def failures() -> list[Row]:
    """Goodput where each of four clouds is down a tenth of the time.

    Goodput is the training time of all cycles whose result entered the model, over clouds times
    virtual duration: time in which a cloud is down, waits or transfers counts as lost, and 0.9 is
    the most that can be had. Mean and standard deviation over seeds.
    """
    schedules: dict[str, Schedule] = {
        "synchronous": Synchronous(),
        "deadline, quorum 2 of 4, 80 s": Deadline(seconds=80.0, quorum=2),
        "buffered, 2 messages": FedBuff(size=2),
        "streaming, 2 fragments, overlapped": Streaming(fragments=2, overlap=True),
        "decoupled, quorum 2 of 4, 2 fragments": Decoupled(quorum=2, fragments=2),
    }
    rows = []
    for minutes, (name, schedule) in itertools.product(REPAIR_MINUTES, schedules.items()):
        found, up = [], []
        for seed in range(SEEDS):
            mtbf_s = 60 * minutes * (1 - FAILING) / FAILING
            clouds = sites(CLOUDS, STEP_SECONDS, seed, 5.0, mtbf_s)
            presences = [Failures(mtbf_s, 60 * minutes, seed, cloud.name) for cloud in clouds]
            timeline = schedule.simulate(clouds, SERVER_STEPS, Opening(HOLDERS, ANSWER))
            part = goodput(timeline, presences)
            found.append(part.of_run)
            up.append(part.of_run / part.while_up)
        what = f"goodput, repair {minutes:g} min, {name}"
        bar = LEAST_GOODPUT if schedule.name == "decoupled" else None
        rows.append(row(what, statistics.mean(found), "", bar, least=True))
        rows.append(row(f"{what}: spread of {SEEDS} seeds", statistics.stdev(found), ""))
        rows.append(row(f"{what}: the clouds were up", statistics.mean(up), ""))
    return rows
