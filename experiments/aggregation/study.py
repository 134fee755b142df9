"""Every aggregation rule on one job: four domains of real text, eight clients, seeds apart.

    command   python experiments/aggregation/study.py [--seeds 3] [--rounds 6] [--workers 2]
    machine, time and result: experiments/aggregation/README.md, beside results.json and study.png,
    which this command writes

The job: stories260K (a real model, five layers) goes on with texts of medicine, finance, general
knowledge and drama, which it has not seen; rank 8 on all projections. Settings differ in how texts
are spread over the clients, in differential privacy per example, and in the clients' ranks. Every
rule has the learning rate that suited it best on a seed that is not reported. What is compared is
the mean held-out loss in nats per token, on the same texts in every setting; a client with an
adapter of its own (fedsa) is measured on its own texts.
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
MODEL = SHARED / "models" / "stories260K"
# Domain: file below shared/data, and the column that is read as plain text.
DOMAINS = {
    "medicine": ("medical/medquad.jsonl.gz", "answer"),
    "finance": ("finance/tfns.jsonl.gz", "prompt"),
    "general": ("general/dolly15k.jsonl.gz", "answer"),
    "drama": ("lm_text/shakespeare_by_role.jsonl.gz", "text"),
}
CLIENTS, LENGTH, RANK = 8, 48, 8
TRAIN_TEXTS, HELD_OUT_TEXTS = 240, 32  # of each domain
MOST_ROWS = 160  # of a client
RANKS = (1, 2, 4, 8, 1, 2, 4, 8)
RATES = (1e-2, 3e-2)
TUNING_SEED = 99
STEPS, BATCH = 4, 8
CLIP, NOISE, DELTA = 1.0, 0.5, 1e-3


@dataclass(frozen=True)
class Setting:
    """What a rule is tried on.

    Attributes:
        spread: iid, dirichlet (0.1 by domain) or domain (two clients each).
        private: per example, with the noise above.
        ranks: whether clients have different ranks.
    """

    spread: str
    private: bool = False
    ranks: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return (
            self.spread + (", DP" if self.private else "") + (", ranks 1-8" if self.ranks else "")
        )


SETTINGS = [
    *(Setting(spread) for spread in ("iid", "dirichlet", "domain")),
    *(Setting(spread, private=True) for spread in ("iid", "dirichlet", "domain")),
    Setting("domain", ranks=True),
]


def texts(seed: int) -> tuple[list[Any], list[Any]]:
    """Training and held-out records, the domain as label."""
    from fedjax_llm.data import Record
    from fedjax_llm.data.splitting import keyed_hash

    train, held_out = [], []
    for domain, (file, column) in DOMAINS.items():
        with gzip.open(SHARED / "data" / file, "rt") as lines:
            rows = [json.loads(line)[column] for line in itertools.islice(lines, 4000)]
        rows = sorted({row.strip()[:400] for row in rows if len(row.strip()) >= 40})
        # Held-out texts are the same for every seed, training texts are not.
        fixed = sorted(rows, key=lambda row: keyed_hash(row, -1))
        kept, rest = fixed[:HELD_OUT_TEXTS], fixed[HELD_OUT_TEXTS:]
        rest = sorted(rest, key=lambda row: keyed_hash(row, seed))[:TRAIN_TEXTS]
        held_out += [Record(prompt="", answer=row, label=domain) for row in kept]
        train += [Record(prompt="", answer=row, label=domain) for row in rest]
    return train, held_out


def spread(records: list[Any], how: str, seed: int) -> list[list[int]]:
    """The indices of each client's records."""
    from fedjax_llm.data import by_label, dirichlet, iid

    labels = [record.label for record in records]
    if how == "iid":
        parts = iid([record.answer for record in records], CLIENTS, seed)
    elif how == "dirichlet":
        parts = dirichlet(labels, None, CLIENTS, 0.1, seed, minimum=2 * BATCH)
    else:
        parts = [part[k::2] for part in by_label(labels, CLIENTS // 2, seed) for k in range(2)]
    return [[int(k) for k in part] for part in parts]


def participants(model: Any, setting: Setting, seed: int) -> list[Any]:
    """Eight clients with their training texts; held-out texts go where their domain is."""
    import numpy as np

    from fedjax_llm.clouds import Cloud, Link
    from fedjax_llm.data import render_all, to_batch
    from fedjax_llm.federation import Participant

    train, held_out = texts(seed)
    parts = spread(train, setting.spread, seed)
    draw = np.random.default_rng(seed)

    def batch(records: list[Any]) -> Any:
        rendered, _ = render_all(records, model.tokenizer, "plain", LENGTH)
        return to_batch(rendered, LENGTH, False, model.tokenizer.pad_id)

    # A held-out text belongs to a client as likely as a training text of its domain.
    owners: list[list[Any]] = [[] for _ in parts]
    for domain in DOMAINS:
        weights = np.array([sum(train[k].label == domain for k in part) for part in parts], float)
        own = [record for record in held_out if record.label == domain]
        for record in own:
            owners[draw.choice(len(parts), p=weights / weights.sum())].append(record)
    return [
        Participant(
            Cloud(f"client-{k}", Link(up_mbps=100.0, down_mbps=100.0)),
            batch([train[i] for i in part[:MOST_ROWS]]),
            batch(owners[k])
            if owners[k]
            else batch(held_out[:1])._replace(loss_mask_BxT=np.zeros((1, LENGTH), bool)),
            rank=RANKS[k] if setting.ranks else None,
        )
        for k, part in enumerate(parts)
    ]


def run(rule: str, setting: Setting, seed: int, rate: float, rounds: int) -> dict[str, Any]:
    """One run; its losses, aggregation error and bytes."""
    import numpy as np
    import optax

    import fedjax_llm as fl
    from fedjax_llm.errors import UserError

    model = fl.load_model(MODEL)
    clients = participants(model, setting, seed)
    privacy = fl.ExamplePrivacy(CLIP, NOISE) if setting.private else None
    kind = "result" if fl.RULES[rule].weighs_by_result else "uniform"
    plan = fl.PrivacyPlan.without_privacy(rounds, STEPS)
    if setting.private:
        plan = fl.PrivacyPlan.for_examples(
            [client.rows for client in clients],
            expected_batch=BATCH,
            steps_per_round=STEPS,
            rounds=rounds,
            clip_norm=CLIP,
            noise_multiplier=NOISE,
            delta=DELTA,
            weights=kind,
        )
    federation = fl.Federation(
        model,
        clients,
        lora=fl.LoraConfig(rank=RANK, alpha=16.0, targets=("all-linear",)),
        training=fl.LocalTraining(optax.adam(rate), STEPS, BATCH, BATCH, privacy),
        rule=fl.RULES[rule](optax.sgd(1.0)),
        plan=plan,
        sum_mode=fl.Plain(),
        update_bound=50.0,
        seed=seed,
    )
    state = federation.init()

    tokens = [int(client.evaluation.loss_mask_BxT.sum()) for client in clients]

    def held_out(state: Any) -> float:
        losses = federation.evaluate(state).values()
        return sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)

    before = held_out(state)
    errors, up, down = [], 0, 0
    started = time.perf_counter()
    try:
        for done, report in federation.rounds(state, rounds):
            state = done
            errors.append(report.aggregation_error)
            up += report.uplink_bytes
            down += report.downlink_bytes
        after = held_out(state)
    except UserError as error:  # diverged at this learning rate
        print(f"{rule} at {rate:g}: {error}", file=sys.stderr)
        after = float("nan")
    return {
        "rule": rule,
        "setting": asdict(setting) | {"name": setting.name},
        "seed": seed,
        "rate": rate,
        "before": before,
        "after": after,
        "error": float(np.mean(errors)) if errors else float("nan"),
        "uplink": up / rounds / CLIENTS,
        "downlink": down / rounds / CLIENTS,
        "epsilon": plan.epsilon() if setting.private else None,
        "seconds": time.perf_counter() - started,
    }


def all_of_a_rule(rule: str, seeds: int, rounds: int) -> list[dict[str, Any]]:
    """Tunes the rate, without and with privacy, then runs every setting and seed."""
    from fedjax_llm.aggregation import RULES

    best = {}
    for private in (False, True):
        tried = [
            run(rule, Setting("domain", private=private), TUNING_SEED, rate, rounds)
            for rate in RATES
        ]
        sound = [found for found in tried if found["after"] == found["after"]]
        best[private] = min(sound, key=lambda found: found["after"])["rate"]
    found = []
    for setting in SETTINGS:
        if setting.ranks and not RULES[rule].facts.ranks:
            continue
        for seed in range(seeds):
            found.append(run(rule, setting, seed, best[setting.private], rounds))
            print(f"{rule:18} {setting.name:22} seed {seed}: {found[-1]['after']:.4f}", flush=True)
    return found


def cells(results: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Rule, setting, and the runs of all seeds."""
    key = lambda found: (found["rule"], found["setting"]["name"])  # noqa: E731
    for (rule, setting), group in itertools.groupby(sorted(results, key=key), key=key):
        yield rule, setting, list(group)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a rule, mean and largest distance from it over the seeds."""
    names = [setting.name for setting in SETTINGS]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for rule, setting, runs in cells(results):
        found.setdefault(rule, {})[setting] = runs
    order = sorted(
        found, key=lambda rule: statistics.mean(r["after"] for r in found[rule]["domain"])
    )
    lines = [
        "| rule | " + " | ".join(names) + " | error, domain | up, kB | down, kB |",
        "|---" * (len(names) + 4) + "|",
    ]
    for rule in order:
        row = [f"`{rule}`"]
        for name in names:
            losses = [run["after"] for run in found[rule].get(name, [])]
            if not losses:
                row.append("–")
                continue
            mean = statistics.mean(losses)
            row.append(f"{mean:.3f} ± {max(abs(loss - mean) for loss in losses):.3f}")
        domain = found[rule]["domain"]
        error = statistics.mean(run["error"] for run in domain)
        row.append("–" if error != error else f"{error:.1e}")
        row += [
            f"{statistics.mean(run[k] for run in domain) / 1e3:.0f}" for k in ("uplink", "downlink")
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a setting: every rule's losses, one dot a seed, best mean on top."""
    import matplotlib.pyplot as plt

    names = [setting.name for setting in SETTINGS]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.1 * len(names), 4.8), layout="constrained"
    )
    by_cell = {(rule, setting): runs for rule, setting, runs in cells(results)}
    for axis, name in zip(axes, names, strict=True):
        own = {rule: [r["after"] for r in runs] for (rule, s), runs in by_cell.items() if s == name}
        order = sorted(own, key=lambda rule: -statistics.mean(own[rule]))
        for place, rule in enumerate(order):
            private = "DP" in name
            colour = "#7c4bd0" if private else "#2a5bd7"
            axis.plot(own[rule], [place] * len(own[rule]), "o", color=colour, alpha=0.55, ms=5)
            axis.plot([statistics.mean(own[rule])], [place], "|", color="#1c1d21", ms=13)
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.grid(axis="x", color="#e6e5df")
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.supxlabel("held-out loss, nats per token (dots: seeds, bar: mean)", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the rules side by side and writes results, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="rules that run at once")
    parser.add_argument("--rules", nargs="*", help="these only")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the three files")
    parser.add_argument("--table", action="store_true", help="only from results.json")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(
            f"study: {MODEL} is not there; set FEDJAX_LLM_SHARED to the folder of models and data"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.json"
    if not arguments.table:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
        from fedjax_llm.aggregation import RULES

        started = time.perf_counter()
        rules = arguments.rules or list(RULES)
        with ProcessPoolExecutor(arguments.workers, max_tasks_per_child=1) as pool:
            jobs = [
                pool.submit(all_of_a_rule, rule, arguments.seeds, arguments.rounds)
                for rule in rules
            ]
            results = [found for job in jobs for found in job.result()]
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{len(results)} runs in {time.perf_counter() - started:,.0f} s")
    results = json.loads(file.read_text())
    print(table(results))
    plot(results, arguments.out / "study.png")


if __name__ == "__main__":
    main()
