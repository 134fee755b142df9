"""The bars on clouds: bytes, a slow link, failures, the simulation's own speed, and the forecast.

    command   python experiments/benchmarks/clouds.py [--part NAME ...] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Parts, each by itself with --part:

    bytes     until a private, encrypted run has the loss with which plain FedAvg ends
    slow      virtual time to that loss with a link that is 100 times slower
    failures  training that entered the model, over time, each cloud down a tenth of it
    overhead  the events of 10,000 clients in 100 rounds
    plan      the forecast of `fedjax-llm plan` against the outcome (clouds_plan.py)
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import clouds_events
import clouds_plan
import clouds_training
from table import Row, show, write

PARTS = ("failures", "overhead", "plan", "slow", "bytes")


def forecast() -> list[Row]:
    """How far the forecasts of `plan` are off; nothing where the model is not there."""
    if not clouds_plan.MODEL.is_dir():
        print(f"plan: left out, {clouds_plan.MODEL} is not there", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        return clouds_plan.rows(clouds_plan.forecasts(Path(folder)))


def main() -> None:
    """Parses the command line, runs the parts, prints a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing")
    given = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "failures": clouds_events.failures,
        "overhead": lambda: clouds_events.overhead(given.repeats),
        "plan": forecast,
        "slow": clouds_training.slow_link,
        "bytes": clouds_training.bytes_to_loss,
    }
    rows: list[Row] = []
    for part in given.part or PARTS:
        started = time.perf_counter()
        found = parts[part]()
        show(found)
        print(f"{part}: {time.perf_counter() - started:,.0f} s", file=sys.stderr, flush=True)
        rows += found
    write(rows, given.json)


if __name__ == "__main__":
    main()
