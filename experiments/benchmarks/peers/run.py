"""Ours against Flower's simulation, pfl-research, FedJAX and a plain PyTorch and PEFT loop.

    command   python experiments/benchmarks/peers/run.py [--only PART ...] [--turns 5] [--json FILE]
    on an accelerator   ... run.py --only accelerator kernels
    machine, time and result: experiments/benchmarks/README.md, "Peers"

Each peer runs in an environment of its own, which is made where it is missing (make_env.sh; four of
them, 5 GB, in FEDJAX_LLM_PEERS or the system's temporary folder). Model, rows, adapter, optimiser
and steps are the same for all and the losses after the same steps are compared: see tasks.py. All
sides of a contest are processes that live at the same time and train one round in turn; what is
compared is the median of the ratios of a turn. The first round, which compiles or starts workers,
counts as start-up. Parts:

- decoder: LoRA of rank 8 on a decoder 288 wide, 6 layers, vocabulary 4,096; 8 clients x 4 steps x
  4 x 128 tokens; against Flower and the plain loop.
- command: the same, the whole command of 4 rounds, from the start of the process to its end;
  with an empty compilation cache and with one that has been filled; against Flower.
- thousand: 1,000 clients x 1 step x 1 x 64 tokens on stories260K; against Flower and pfl-research.
- emnist: FedJAX's own EMNIST task, the dense model; see dense_tasks.py.
- memory: peak memory of the process with a cohort of 10,000 and of 100; clients as in "thousand".
- host: what a round takes outside its compiled program, for "decoder" and "thousand": all but the
  stage "train" of its report, to which the start of the program and a check of its result belong.
- processes: two processes with a core each and eight clients, against one with a core and four.
- accelerator: model FLOP utilisation of a round of 16 clients on a decoder of a billion weights in
  bfloat16, and against the plain loop on the same device; see accelerator.py.
- kernels: each kernel's share of its roofline, on an accelerator; see ../kernels.py.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from accelerator import accelerator, kernels  # noqa: E402
from contests import (  # noqa: E402
    FEDJAX,
    FLOWER,
    OURS,
    OURS_DENSE,
    PFL,
    PLAIN,
    Contest,
    Part,
    check_only,
)
from dense_tasks import DENSE  # noqa: E402
from sides import Side, folder_of  # noqa: E402
from table import Row, row, show, write  # noqa: E402
from tasks import TASKS  # noqa: E402
from whole_command import COMMAND_ROUNDS, command  # noqa: E402

# Who trains adapters, by the name in the rows.
PEERS = {"flower": FLOWER, "plain loop": PLAIN, "pfl": PFL}


def _adapters(task: str, bars: dict[str, float], work: float, unit: str, trial: int = 3) -> Contest:
    """A contest in training adapters, against the peers that have a bar."""
    peers = {name: PEERS[name] for name in bars}
    return Contest(task, OURS, peers, bars, work, unit, trial=trial)


def decoder(turns: int) -> list[Row]:
    """Steady rounds of the decoder."""
    bars = {"flower": 2.0, "plain loop": 1.6}
    return _adapters("decoder", bars, TASKS["decoder"].tokens, "tokens").rows(turns)


def thousand(turns: int) -> list[Row]:
    """A thousand small clients."""
    bars = {"flower": 20.0, "pfl": 5.0}
    return _adapters("thousand", bars, TASKS["thousand"].clients, "clients", trial=2).rows(turns)


def emnist(turns: int) -> list[Row]:
    """FedJAX's task; its rounds are short, so that a turn is ten of them."""
    task = DENSE["emnist"]
    contest = Contest(
        "emnist",
        OURS_DENSE,
        {"fedjax": FEDJAX},
        {"fedjax": 3.0},
        task.cohort,
        "clients",
        "prepare_dense.py",
        trial=20,
        a_turn=10,
        alike=False,
    )
    # FedJAX compiles once for each size of a last batch; whole batches leave one.
    rows = contest.rows(turns, warm=5)
    checked = check_only(
        "emnist-check", OURS_DENSE[0], "fedjax", FEDJAX[0], "prepare_dense.py", COMMAND_ROUNDS
    )
    return rows + checked


def memory(turns: int) -> list[Row]:
    """Peak memory of a process with few clients and with many."""
    peaks = {}
    for task in ("cohort-100", "cohort-10000"):
        with OURS[0].side(task, folder_of(task), 2, wait=False) as side:
            peaks[task] = side.finish().tail["peak_bytes"]
    few, many = peaks.values()
    rows = [row(f"memory: {task}", peak / 1e6, "MB") for task, peak in peaks.items()]
    return [*rows, row("memory: cohort of 10,000 against 100", many / few, "x", 1.2)]


def host(turns: int) -> list[Row]:
    """The share of rounds that is not spent in the compiled program."""
    rows = []
    for task in ("decoder", "thousand"):
        with OURS[0].side(task, folder_of(task), turns + 1, wait=False) as side:
            done = side.finish().rounds[1:]
        shares = [1 - one["program"] / one["seconds"] for one in done]
        rows += [
            row(f"host: share of a round, {task}", statistics.median(shares), "", 0.03),
            row(
                f"host: seconds of a round, {task}",
                statistics.median(one["seconds"] - one["program"] for one in done),
                "s",
            ),
        ]
    return rows


def processes(turns: int) -> list[Row]:
    """Weak scaling: two processes on two cores against one on one of them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("processes: not measured, this machine has one core", flush=True)
        return []
    speeds = {}
    for script, task in (("ours.py", "half"), ("ours_launched.py", "decoder")):
        alone = ("taskset", "-c", str(cores[0])) if script == "ours.py" else ()
        folder = folder_of(task)
        with Side("ours", script, task, folder, rounds=turns + 1, wait=False, prefix=alone) as side:
            seconds = statistics.median(side.finish().steady(1))
        speeds[script] = TASKS[task].tokens / seconds
    one, two = speeds.values()
    return [
        row("processes: one, one core", one, "tokens/s"),
        row("processes: two, one core each", two, "tokens/s"),
        row("processes: two against one, weak scaling", two / one, "x", 1.8, least=True),
    ]


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (
        decoder,
        command,
        thousand,
        emnist,
        memory,
        host,
        processes,
        accelerator,
        kernels,
    )
}


def main() -> int:
    """Parses the command line, runs the parts, prints; 1 if a part could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=int, default=5, help="rounds of each side that count")
    parser.add_argument("--json", type=Path, help="write the rows there")
    asked = parser.parse_args()
    started, rows, broken = time.perf_counter(), [], []
    for name in asked.only:
        try:
            found = PARTS[name](asked.turns)
        except Exception as error:
            # Hours may lie behind: the other parts are worth having.
            broken.append(name)
            print(f"{name}: not measured: {error}", flush=True)
            continue
        show(found)
        rows += found
        write(rows, asked.json)
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
