"""What harmonisation finds and what it changes: three clouds with schemas, copies and leaks.

    command   python experiments/harmonisation/study.py [--seeds 2] [--json FILE]
    machine, time and result: experiments/harmonisation/README.md

A pool of rows (medical facts of `builtin:medical`, headlines of TFNS with their sentiment,
questions of MedQuAD) is divided among three clouds, each with its own columns, its own names of the
three sentiments and its own kind of invisible noise. Then copies are injected, of which the study
keeps the truth: some rows of each cloud stand in it many times (exact, or with a typing error or
another word), as boilerplate does on the web (arXiv 2107.06499), and a third of each cloud's rows
stand in another cloud too. A part of the pool is in no cloud: the clean test.

The same job then runs with more and more of [harmonise]: nothing; cleaning and labels; duplicates
inside the clouds; duplicates across them. Of each the study reports the loss that the run itself
would report, on what the clouds hold out, and the loss on the clean test. What the first lacks of
the second is what leakage adds to an evaluation.
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))

SENTIMENTS = ("negative", "neutral", "positive")
TEST, BOILERPLATE, REPEATS = 0.25, 10, 12
THRESHOLD = 0.7  # a word of ten changed, in rows of about a hundred characters
KINDS = ("exact", "case or spacing", "typing error", "other word")

# Columns of prompt, answer and label, the names of the sentiments, and the noise of each cloud.
CLOUDS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str], str]] = {
    "hospital": (("Question", "Reply", "class"), ("0", "1", "2"), "\u00a0"),
    "bank": (("headline", "view", "view_code"), ("Bearish", "Hold", "Bullish"), "\u200b"),
    "agency": (("ask", "say", "tag"), ("NEG", "NEUT", "POS"), "\u00ad"),
}

RUN_FILE = """\
name = "harmonisation"
seed = {seed}
rounds = {rounds}

[model]
path = {model}

[adapter]
rank = 16
alpha = 32.0
targets = ["*_proj"]

[training]
local_steps = 10
batch_size = 16
microbatch = 16
sequence_length = 112
optimizer = "adam"
learning_rate = 1e-2
template = "plain"

[aggregation]
rule = "factor-averaging"

[privacy]
unit = "none"

[evaluation]
examples_per_cloud = 200
aggregation_error = false
"""

LABELS = """labels = { negative = ["0", "Bearish", "NEG"], neutral = ["1", "Hold", "NEUT"], \
positive = ["2", "Bullish", "POS"] }
"""
NEAR = f'duplicates = "near"\nthreshold = {THRESHOLD}'
ARMS = {
    "as they are": "",
    "cleaning and labels": f'[harmonise]\nduplicates = "off"\n{LABELS}',
    "duplicates inside": f"[harmonise]\n{NEAR}\n{LABELS}",
    "duplicates across": f'[harmonise]\n{NEAR}\nacross = "private"\n{LABELS}',
}


@dataclass(frozen=True)
class Row:
    """A row of the pool or a copy of one.

    Attributes:
      name: Unique.
      origin: The name of the row that it is a copy of; its own if it is none.
      kind: How it was copied; empty for originals.
      prompt, answer, label: In the common schema; the label is empty but for sentiments.
    """

    name: str
    origin: str
    prompt: str
    answer: str
    label: str = ""
    kind: str = ""


def pool(rng: random.Random) -> list[Row]:
    """Rows of three domains, none of them a near duplicate of another."""
    from fedjax_llm.data import Record, builtin_rows
    from fedjax_llm.data.harmonise import Likeness, drop_duplicates

    facts = {row["topic"]: row for row in builtin_rows("medical", 2700, 0)}
    found = [(row["question"], row["response"], "") for row in facts.values()]
    for file, count, longest in (("finance/tfns", 120, 130), ("medical/medquad", 240, 170)):
        with gzip.open(SHARED / "data" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if len(row["prompt"] + row["answer"]) <= longest]
        rng.shuffle(rows)
        for label in SENTIMENTS if file.startswith("finance") else ("",):
            same = [row for row in rows if row.get("label", "") == label][:count]
            found += [(row["prompt"], row["answer"], label) for row in same]
    records = [Record(prompt, answer, label=label) for prompt, answer, label in found]
    # Real data repeat themselves; here only what is injected may.
    records, _ = drop_duplicates(records, Likeness("near", threshold=THRESHOLD))
    rng.shuffle(records)
    return [Row(f"r{i}", f"r{i}", r.prompt, r.answer, r.label) for i, r in enumerate(records)]


def copied(row: Row, name: str, kind: str, rng: random.Random) -> Row:
    """A copy of a row: the same, or with a change in its prompt."""
    prompt = row.prompt
    if kind == "case or spacing":
        prompt = prompt.upper() if rng.random() < 0.5 else prompt.replace(" ", "  ")
    elif kind == "typing error":
        place = rng.randrange(len(prompt) - 1)
        prompt = prompt[:place] + prompt[place + 1] + prompt[place] + prompt[place + 2 :]
    elif kind == "other word":
        words = prompt.split(" ")
        words[rng.randrange(len(words))] = rng.choice(("really", "perhaps", "also", "now"))
        prompt = " ".join(words)
    return replace(row, name=name, prompt=prompt, kind=kind)


def clouds_and_test(seed: int) -> tuple[dict[str, list[Row]], list[Row]]:
    """The rows of each cloud with the injected copies, and the clean test."""
    rng = random.Random(seed)
    rows = pool(rng)
    held = int(TEST * len(rows))
    test, rest = rows[:held], rows[held:]
    own = {name: rest[k :: len(CLOUDS)] for k, name in enumerate(CLOUDS)}
    number = itertools.count()
    held_by = {name: list(mine) for name, mine in own.items()}
    for name, mine in own.items():
        for row in mine[:BOILERPLATE]:
            held_by[name] += [
                copied(row, f"c{next(number)}", rng.choice(KINDS), rng) for _ in range(REPEATS)
            ]
        others = [other for other in CLOUDS if other != name]
        for row in mine[BOILERPLATE : BOILERPLATE + len(mine) // 3]:
            held_by[rng.choice(others)].append(
                copied(row, f"c{next(number)}", rng.choice(KINDS), rng)
            )
    for mine in held_by.values():
        rng.shuffle(mine)
    return held_by, test


def write_clouds(folder: Path, held_by: dict[str, list[Row]], rng: random.Random) -> str:
    """Writes each cloud's file in its own schema, and returns the clouds of a run file."""
    text = ""
    for name, rows in held_by.items():
        (prompt, answer, label), names, noise = CLOUDS[name]
        own = dict(zip(SENTIMENTS, names, strict=True))

        def noisy(value: str, noise: str = noise) -> str:
            words = value.split(" ")
            place = rng.randrange(len(words))
            words[place] += noise if len(noise.strip()) else ""
            return (noise if noise == "\u00a0" else " ").join(words)

        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([prompt, answer, label, "id"])
            for row in rows:
                said = own.get(row.answer, row.answer) if row.label else row.answer
                table.writerow([noisy(row.prompt), said, own.get(row.label, ""), row.name])
        text += (
            f'\n[[clouds]]\nname = "{name}"\n[clouds.data]\nsources = ["{name}.csv"]\n'
            f'eval_fraction = 0.2\nmapping = {{ prompt = "{prompt}", answer = "{answer}", '
            f'label = "{label}", source = "id" }}\n'
        )
    return text


def detected(held_by: dict[str, list[Row]]) -> dict[str, Any]:
    """Precision and recall against the injected truth, for each way of looking.

    A pair of rows is injected if both are copies of one row. It is found if not both stay. A row
    that goes is right if a row of its family stays. Across clouds is looked at after near
    duplicates inside them are gone.
    """
    from fedjax_llm.data import Record
    from fedjax_llm.data.harmonise import Likeness, drop_across, drop_duplicates
    from fedjax_llm.data.harmonise.shingles import compared_text, shingle

    rows = {row.name: row for mine in held_by.values() for row in mine}
    records = {
        name: [Record(row.prompt, row.answer, source=row.name) for row in mine]
        for name, mine in held_by.items()
    }

    def judged(stays: set[str], pairs: list[tuple[str, str]], present: set[str]) -> dict[str, Any]:
        gone = present - stays
        families = {rows[name].origin for name in stays}
        right = sum(rows[name].origin in families for name in gone)
        sets = shingle([compared_text(Record(r.prompt, r.answer), "record") for r in rows.values()])
        place = {name: k for k, name in enumerate(rows)}
        alike = [sets.jaccard(place[a], place[b]) >= THRESHOLD for a, b in pairs]
        found = [not (a in stays and b in stays) for a, b in pairs]
        return {
            "removed": len(gone),
            "precision": right / max(len(gone), 1),
            "pairs": len(pairs),
            "recall": statistics.mean(found),
            "pairs_above_threshold": sum(alike),
            "recall_above_threshold": statistics.mean(
                hit for hit, like in zip(found, alike, strict=True) if like
            ),
        }

    def pairs_of(groups: list[list[Row]]) -> list[tuple[str, str]]:
        return [
            (a.name, b.name)
            for one, two in itertools.combinations(groups, 2)
            for a in one
            for b in two
            if a.origin == b.origin
        ]

    report: dict[str, Any] = {}
    within = [
        (a.name, b.name)
        for mine in held_by.values()
        for a, b in itertools.combinations(mine, 2)
        if a.origin == b.origin
    ]
    kept = records
    for kind in ("exact", "near"):
        likeness = Likeness(kind, threshold=THRESHOLD)
        kept = {name: drop_duplicates(mine, likeness)[0] for name, mine in records.items()}
        stays = {record.source for mine in kept.values() for record in mine}
        report[f"inside, {kind}"] = judged(stays, within, set(rows))
    for kind, how in (("exact", "private"), ("near", "keyed"), ("near", "private")):
        started = time.perf_counter()
        left, _, meetings = drop_across(kept, Likeness(kind, threshold=THRESHOLD), how)
        seconds = time.perf_counter() - started
        present = {record.source for mine in kept.values() for record in mine}
        groups = [[rows[r.source] for r in mine] for mine in kept.values()]
        stays = {record.source for mine in left.values() for record in mine}
        report[f"across, {kind}, {how}"] = judged(stays, pairs_of(groups), present) | {
            "seconds": seconds,
            "bytes": sum(len(data) for meeting in meetings for data in meeting.messages),
            "lost": {name: len(kept[name]) - len(left[name]) for name in kept},
        }
    return report


def run(
    folder: Path,
    model_path: Path,
    arm: str,
    seed: int,
    rounds: int,
    held_by: dict[str, list[Row]],
    test: list[Row],
) -> dict[str, Any]:
    """One run: rows trained on, the loss it reports, and the loss on the clean test."""
    from fedjax_llm.data import Record, render_all, to_batch
    from fedjax_llm.runs import build, runfile
    from fedjax_llm.runs.events import ignore

    text = RUN_FILE.format(seed=seed, rounds=rounds, model=json.dumps(str(model_path)))
    file = folder / "run.toml"
    file.write_text(text + ARMS[arm] + (folder / "clouds.toml").read_text())
    run_file = runfile.load(file)
    base = build.model(run_file, ignore)
    corpora = build.corpora(run_file, base, ignore)
    federation = build.federation(run_file, base, corpora)
    training = run_file.training

    def batch(rows: list[Row]) -> Any:
        records = [Record(row.prompt, row.answer) for row in rows]
        rendered, _ = render_all(records, base.tokenizer, "plain", training.sequence_length)
        return to_batch(rendered, training.sequence_length, False, base.tokenizer.pad_id)

    state = federation.init()
    for _ in range(rounds):
        state, _ = federation.run_round(state)
    reported = federation.evaluate(state)
    # The same model, judged on the clean test: all of it, and two parts of it, one in the place of
    # each cloud's own evaluation rows.
    sides = [test, [row for row in test if row.label], [row for row in test if not row.label]]
    judged = [
        replace(corpus, evaluation=batch(side)) for corpus, side in zip(corpora, sides, strict=True)
    ]
    everything = run_file.evaluation.model_copy(update={"examples_per_cloud": len(test)})
    judge = build.federation(
        run_file.model_copy(update={"evaluation": everything}), base, judged
    ).evaluate(state)
    clean, sentiment, others = judge.values()
    origin = {row.name: row.origin for rows in held_by.values() for row in rows}
    seen = {origin[r.source] for corpus in corpora for r in corpus.train_records}
    held_out = [origin[r.source] for corpus in corpora for r in corpus.evaluation_records]
    return {
        "arm": arm,
        "seed": seed,
        "rows": sum(len(corpus.train_records) for corpus in corpora),
        "leaked": sum(name in seen for name in held_out) / len(held_out),
        "reported": statistics.mean(reported.values()),
        "clean": clean,
        "clean_sentiment": sentiment,
        "clean_others": others,
        "ledgers": {
            corpus.name: corpus.report.ledger.to_json() if corpus.report.ledger else None
            for corpus in corpora
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories260K")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    started = time.perf_counter()
    found: list[Any] = []
    detection: list[Any] = []
    for seed in range(given.seeds):
        held_by, test = clouds_and_test(seed)
        sizes = {name: len(rows) for name, rows in held_by.items()}
        print(f"seed {seed}: {sizes} rows in the clouds, {len(test)} in the clean test", flush=True)
        detection.append(detected(held_by))
        for what, row in detection[-1].items():
            print(
                f"  {what:<24} {row['removed']:>4} removed, precision {row['precision']:.3f}, "
                f"recall {row['recall']:.3f} ({row['recall_above_threshold']:.3f} of the "
                f"{row['pairs_above_threshold']} of {row['pairs']} pairs above the threshold)",
                flush=True,
            )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            clouds = write_clouds(folder, held_by, random.Random(seed))
            (folder / "clouds.toml").write_text(clouds)
            for arm in ARMS:
                found.append(run(folder, given.model, arm, seed, given.rounds, held_by, test))
                row = found[-1]
                print(
                    f"  {arm:<20} {row['rows']:>4} rows, {row['leaked']:.0%} of the held out seen "
                    f"in training, reported {row['reported']:.3f}, clean {row['clean']:.3f} "
                    f"(sentiment {row['clean_sentiment']:.3f}, others {row['clean_others']:.3f})",
                    flush=True,
                )
    seconds = time.perf_counter() - started
    busy = time.process_time()
    print(f"{seconds:,.0f} s, of which processors were busy {busy:,.0f} s")
    if given.json:
        content = {"seconds": seconds, "seconds_busy": busy, "detection": detection, "runs": found}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
