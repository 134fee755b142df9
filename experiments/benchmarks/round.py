"""A round of the quickstart: tokens a second, peak memory, and where the time goes.

    command   python experiments/benchmarks/round.py [--rounds 3] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Each model runs in a process of its own, so that its peak memory is its own. The first round, which
compiles, is reported apart; the others are medians. Privacy and encryption are those of the
quickstart's run file.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import Row, row, show, write

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart" / "quickstart.toml"
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
# The run file's overrides by model; stories15M has no chat template.
MODELS: dict[str, list[str]] = {
    "smollm2-135m": [],
    "stories15M": [
        f"model={{path={json.dumps(str(SHARED / 'models' / 'stories15M'))}}}",
        "training.template=plain",
        "training.sequence_length=64",
    ],
}


def measure(name: str, rounds: int) -> list[Row]:
    """Runs one model in this process and returns its rows."""
    from fedjax_llm.runs import build, runfile

    run_file = runfile.load(QUICKSTART, [*MODELS[name], f"rounds={rounds + 1}"])
    started = time.perf_counter()
    model = build.model(run_file, lambda event: None)
    corpora = build.corpora(run_file, model, lambda event: None)
    seconds_load = time.perf_counter() - started
    started = time.perf_counter()
    federation = build.federation(run_file, model, corpora)
    seconds_keys = time.perf_counter() - started

    state = federation.init()
    federation.evaluate(state)
    reports, whole, evaluations = [], [], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        state, report = federation.run_round(state)
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        federation.evaluate(state)
        evaluations.append(time.perf_counter() - started)
        reports.append(report)
    steady = reports[1:]
    train = statistics.median(report.seconds["train"] for report in steady)
    secure = statistics.median(
        report.seconds["encrypt"] + report.seconds["add"] + report.seconds["decrypt"]
        for report in steady
    )
    total = statistics.median(
        whole + evaluation for whole, evaluation in zip(whole[1:], evaluations[1:], strict=True)
    )
    tokens = statistics.median(report.tokens / report.seconds["train"] for report in steady)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    found = [
        ("training speed", tokens, "tokens/s"),
        ("round with evaluation", total, "s"),
        ("share of the round in training", train / total, "1"),
        ("share of the round in encryption, addition and decryption", secure / total, "1"),
        (
            "share of the round in the rest (evaluation, server step)",
            1 - (train + secure) / total,
            "1",
        ),
        ("trained parameters", float(federation.parameters), "1"),
        (
            "uplink of one cloud in one round",
            statistics.median(r.uplink_bytes / len(r.clouds) for r in steady),
            "bytes",
        ),
        ("first round, with compilation", whole[0], "s"),
        ("model and data", seconds_load, "s"),
        ("key ceremony and set-up", seconds_keys, "s"),
        ("peak memory of the process", float(peak), "bytes"),
    ]
    return [row(f"{name}: {what}", measured, unit) for what, measured, unit in found]


def main() -> None:
    """Parses the command line, runs each model in a process of its own, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="measured rounds, after one to warm up"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--model", choices=MODELS, help="this model only, in this process")
    arguments = parser.parse_args()
    if arguments.model:
        rows = measure(arguments.model, arguments.rounds)
    else:
        rows = []
        for name in MODELS:
            if name == "stories15M" and not (SHARED / "models" / name).is_dir():
                print(f"{name}: left out, {SHARED / 'models' / name} is not there")
                continue
            with tempfile.NamedTemporaryFile(suffix=".json") as part:
                command = [sys.executable, __file__, "--model", name, "--json", part.name]
                subprocess.run(
                    [*command, "--rounds", str(arguments.rounds)],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                rows += json.loads(Path(part.name).read_text())
    show(rows)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
