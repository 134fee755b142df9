"""DP-LoRA as published and mended: what its numbers certify under each reading, and what they cost.

    command   python experiments/dp_lora/compare.py [--seeds 3] [--rounds 50] [--json FILE]
    machine, time and result: experiments/dp_lora/README.md

The paper (arXiv 2312.17493, algorithm 1 and section 5) gives sigma = 2, clip norm C = 10 and T = 50
rounds. An epsilon follows from those only together with a unit, a sampler, what the clip bounds and
what the noise is added to. The first table has the epsilon of each reading for the job below.

The job, which both forms share: stories15M (or the model given) goes on with Dolly, MedQuAD, TFNS
and Shakespeare, one cloud each, rank 8 on q and v, one local step a round. Published: A and B are
clipped and noised apart and averaged apart, weighted by data. Mended: one joint norm, Poisson
sampling, A fixed (`ffa`) or turned with the product (`fedsvd`), uniform weights. All are compared
at the same certified epsilon per example; for the published form the noise multiplier counts both
norms. The clip norm is 1 for all (10 clips nothing here and would only be more noise).
"""

import argparse
import gzip
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
SIGMA, CLIP, ROUNDS, DELTA = 2.0, 10.0, 50, 1e-5
CLOUDS = {
    "medicine": ("medical/medquad.jsonl.gz", "answer"),
    "finance": ("finance/tfns.jsonl.gz", "prompt"),
    "general": ("general/dolly15k.jsonl.gz", "answer"),
    "drama": ("lm_text/shakespeare_by_role.jsonl.gz", "text"),
}
EXAMPLES, HELD_OUT, BATCH, LENGTH = 1000, 48, 16, 64
RATES = (3e-3, 1e-2, 3e-2)
TUNING_SEED = 99


def readings(rounds: int) -> list[dict[str, Any]]:
    """The epsilon of sigma and C at delta under each reading; None where none is certified."""
    from fedjax_llm import PrivacyPlan
    from fedjax_llm.errors import Refused

    apart = SIGMA / math.sqrt(2)  # A and B bounded by C each: together sqrt(2) C
    # What is read, then unit, sampling rate, noise multiplier, neighbours.
    ways: list[tuple[str, str, float | None, float, str]] = [
        (
            "example, Poisson, one norm for A and B",
            "example",
            BATCH / EXAMPLES,
            SIGMA,
            "add-remove",
        ),
        ("example, Poisson, A and B apart", "example", BATCH / EXAMPLES, apart, "add-remove"),
        ("the same, one example replaced", "example", BATCH / EXAMPLES, apart, "replace"),
        ("example, all in every step, one norm", "example", 1.0, SIGMA, "add-remove"),
        ("example, all in every step, A and B apart", "example", 1.0, apart, "add-remove"),
        ("the same, one example replaced", "example", 1.0, apart, "replace"),
        (
            "example, Poisson, sigma C on the mean of a batch",
            "example",
            BATCH / EXAMPLES,
            SIGMA * BATCH,
            "add-remove",
        ),
        ("client, noise of each client counted", "client", 1.0, apart, "add-remove"),
        ("client, the noise of all four added up", "client", 1.0, 2 * apart, "add-remove"),
        ("example, batches of a fixed size", "example", None, SIGMA, "add-remove"),
    ]
    found = []
    for what, unit, rate, noise, adjacency in ways:
        settings: dict[str, Any] = {
            "rounds": rounds,
            "clip_norm": CLIP,
            "noise_multiplier": noise,
            "adjacency": adjacency,
        }
        try:
            if rate is None:
                without = PrivacyPlan.without_privacy(rounds)
                PrivacyPlan(unit, without.sampler, units=(EXAMPLES,), delta=DELTA, **settings)
            plan = (
                PrivacyPlan.for_clients(4, delta=1e-2, **settings)
                if unit == "client"
                else PrivacyPlan.for_examples(
                    [EXAMPLES],
                    expected_batch=EXAMPLES * (rate or 1.0),
                    steps_per_round=1,
                    delta=DELTA,
                    **settings,
                )
            )
            found.append({"reading": what, "epsilon": plan.epsilon(), "delta": plan.delta})
        except Refused as error:
            found.append({"reading": what, "epsilon": None, "refused": str(error)})
    return found


def participants(model: Any, seed: int) -> list[Any]:
    """One cloud a domain; held-out texts are the same for every seed."""
    from fedjax_llm.clouds import Cloud, Link
    from fedjax_llm.data import Record, render_all, to_batch
    from fedjax_llm.data.splitting import keyed_hash
    from fedjax_llm.federation import Participant

    def batch(texts: list[str]) -> Any:
        records = [Record(prompt="", answer=text) for text in texts]
        rendered, _ = render_all(records, model.tokenizer, "plain", LENGTH)
        return to_batch(rendered, LENGTH, False, model.tokenizer.pad_id)

    found = []
    for name, (file, column) in CLOUDS.items():
        with gzip.open(SHARED / "data" / file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)[column] for line in itertools.islice(lines, 6000)]
        texts = sorted({row.strip()[:500] for row in rows if len(row.strip()) >= 40})
        fixed = sorted(texts, key=lambda text: keyed_hash(text, -1))
        rest = sorted(fixed[HELD_OUT:], key=lambda text: keyed_hash(text, seed))
        found.append(
            Participant(
                Cloud(name, Link(up_mbps=100.0, down_mbps=100.0)),
                batch(rest[:EXAMPLES]),
                batch(fixed[:HELD_OUT]),
            )
        )
    return found


def run(form: str, model_path: Path, rate: float, seed: int, rounds: int, epsilon: float) -> Any:
    """Held-out losses before and after one run, and what it certified."""
    import optax

    import fedjax_llm as fl

    model = fl.load_model(model_path)
    clouds = participants(model, seed)
    sizes = [cloud.rows for cloud in clouds]
    published = form == "published"
    plan = fl.PrivacyPlan.for_examples(
        sizes,
        expected_batch=BATCH,
        steps_per_round=1,
        rounds=rounds,
        clip_norm=math.sqrt(2) if published else 1.0,
        noise_multiplier=1.0,
        delta=1e-4,
        weights="examples" if published else "uniform",
    ).noise_for(epsilon)
    clip = fl.PerFactor(1.0, 1.0) if published else 1.0
    rule = fl.RULES["factor-averaging" if published else form]
    federation = fl.Federation(
        model,
        clouds,
        lora=fl.LoraConfig(rank=8, alpha=16.0),
        training=fl.LocalTraining(
            optax.adam(rate), 1, BATCH, BATCH, fl.ExamplePrivacy(clip, plan.noise_multiplier)
        ),
        rule=rule(optax.sgd(1.0)),
        plan=plan,
        sum_mode=fl.Plain(),
        update_bound=20.0,
        weights=fl.Weights.of(sizes, len(sizes), kind="examples") if published else None,
        measure_error=False,
        seed=seed,
    )
    state = federation.init()
    before = statistics.mean(federation.evaluate(state).values())
    for _ in range(rounds):
        state, _ = federation.run_round(state)
    after = statistics.mean(federation.evaluate(state).values())
    return {
        "form": form,
        "seed": seed,
        "rate": rate,
        "before": before,
        "after": after,
        "epsilon": plan.epsilon(),
        "noise": plan.noise_multiplier,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories260K")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    table = readings(ROUNDS)
    print(
        f"sigma = {SIGMA:g}, C = {CLIP:g}, {ROUNDS} rounds of one step, batch {BATCH} of {EXAMPLES}"
    )
    for row in table:
        value = "none: refused" if row["epsilon"] is None else f"{row['epsilon']:.2f}"
        print(f"  {row['reading']:<52} epsilon {value}")
    runs: list[Any] = []
    if given.model.is_dir():
        started = time.perf_counter()
        for form in ("published", "ffa", "fedsvd"):
            tuned = [
                run(form, given.model, rate, TUNING_SEED, given.rounds, given.epsilon)
                for rate in RATES
            ]
            rate = min(tuned, key=lambda one: one["after"])["rate"]
            for seed in range(given.seeds):
                runs.append(run(form, given.model, rate, seed, given.rounds, given.epsilon))
            own = [one for one in runs if one["form"] == form]
            losses = [one["after"] for one in own]
            mean = statistics.mean(losses)
            print(
                f"{form:<12} rate {rate:g}, noise {own[0]['noise']:.3f}, epsilon "
                f"{own[0]['epsilon']:.2f}: {own[0]['before']:.3f} -> {mean:.3f} +- "
                f"{max(abs(loss - mean) for loss in losses):.3f} nats",
                flush=True,
            )
        print(f"{time.perf_counter() - started:,.0f} s")
    else:
        print(f"the runs are left out: {given.model} is not there", file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps({"readings": table, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
