"""Two cross-cloud papers against plain federated averaging, as bandwidth falls 1 to 1000 times.

    command   python experiments/cross_cloud/study.py [--seeds 2] [--set KEY=VALUE ...]
              python experiments/cross_cloud/study.py --again, table and picture of results.json
    machine, time and result: experiments/cross_cloud/README.md, beside results.json and study.png,
    which this command writes

From arXiv 2410.19130 the four ways of aggregation: federated averaging, dynamic weights, gradients,
asynchronous. From arXiv 2503.12226 the weight rule L / (D B^alpha), as published and bounded, and
hybrid aggregation under encryption: clients are summed inside their cloud, the clouds' sums are
encrypted. Beside them this framework's own way, one factor, few bits and a schedule that does not
wait. All take the same local steps, except the asynchronous ones, whose clouds take as many as they
can. Training does not depend on bandwidth where all clouds wait for each other: there it runs once,
and time and money are those of its timeline at each bandwidth. A decoupled cloud trains for as long
as its message is under way; the thinnest links are left out there.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.federation import Federation
from fedjax_llm.models import Batch, Model, apply
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.events import ignore

HERE = Path(__file__).resolve().parent
SLOWER = (1, 10, 100, 1000)
# Nats above the loss with which federated averaging ends, within which a way counts as level.
MARGIN = 0.05


@dataclass(frozen=True)
class Way:
    """A way of aggregation.

    Attributes:
        name: for tables.
        source: of the method.
        keys: overrides of the run file.
        rounds: over those of the run file.
        clients: in each cloud.
        slowest: the last of `SLOWER` at which it runs.
    """

    name: str
    source: str
    keys: tuple[str, ...] = ()
    rounds: float = 1.0
    clients: int = 1
    slowest: int = SLOWER[-1]


_FEW_BITS = (
    'aggregation.rule="ffa"',
    'aggregation.weights="uniform"',
    "training.learning_rate=2e-2",
    'secure.sum="threshold"',
    "secure.bits=8",
    "secure.update_bound=40.0",
    'compression={codec="rotation", rounding="stochastic", error_feedback=true, broadcast="sum"}',
)
WAYS = (
    Way("federated averaging", "1602.05629; both papers' baseline"),
    Way("dynamic weights", "2410.19130; 2503.12226", ('aggregation.weights="loss"',)),
    Way("dynamic weights, bounded", "ours", ('aggregation.weights="loss-bounded"',)),
    Way(
        "gradients",
        "2410.19130",
        (
            'aggregation.exchange="gradients"',
            'aggregation.server_optimizer="adam"',
            "aggregation.server_learning_rate=1e-2",
            "training={local_steps=1, batch_size=8, microbatch=8, sequence_length=64, "
            'template="plain"}',
        ),
        rounds=4.0,
    ),
    Way(
        "asynchronous",
        "2410.19130, as FedBuff",
        ('schedule={name="buffered", size=2}', 'aggregation.weights="uniform"'),
        rounds=1.5,
    ),
    Way(
        "hybrid, encrypted",
        "2503.12226",
        ('aggregation.rule="ffa"', "training.learning_rate=2e-2", 'secure.sum="threshold"'),
        clients=2,
    ),
    Way("few bits, encrypted", "ours", _FEW_BITS),
    Way(
        "few bits, encrypted, decoupled",
        "ours; 2604.21428",
        (*_FEW_BITS, 'schedule={name="decoupled", quorum=2}'),
        rounds=1.5,
        # At a thousandth a cloud takes 740 local steps between two messages, 6,400 cycles in all:
        # epochs by the dozen over the same rows.
        slowest=100,
    ),
)


@dataclass
class Trace:
    """One way, seed and bandwidth; lists have an entry a round.

    Attributes:
        way: its name.
        seed: of the run.
        slower: what bandwidths are divided by.
        loss: held out, nats, mean of the clouds.
        token_accuracy: of held-out answer tokens, those that are the likeliest.
        exact_match: of held-out answers, those that greedy decoding gives word by word.
        bytes: both ways, so far.
        seconds: virtual, so far.
        dollars: rent and egress, so far.
    """

    way: str
    seed: int
    slower: int
    loss: list[float] = field(default_factory=list)
    token_accuracy: list[float] = field(default_factory=list)
    exact_match: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dollars: list[float] = field(default_factory=list)


def job(overrides: Sequence[str], way: Way, seed: int) -> tuple[Any, Model, list[Any]]:
    """The run file of a way, its model and its data."""
    file = runfile.load(HERE / "study.toml", [*overrides, *way.keys, f"seed={seed}"])
    clouds = tuple(cloud.model_copy(update={"clients": way.clients}) for cloud in file.clouds)
    rounds = round(file.rounds * way.rounds)
    file = file.model_copy(update={"clouds": clouds, "rounds": rounds})
    model = build.model(file, ignore)
    return file, model, build.corpora(file, model, ignore)


def with_links(file: Any, slower: int) -> Any:
    """The run file with bandwidths divided."""
    clouds = []
    for cloud in file.clouds:
        mbps = {key: getattr(cloud.link, key) / slower for key in ("up_mbps", "down_mbps")}
        clouds.append(cloud.model_copy(update={"link": cloud.link.model_copy(update=mbps)}))
    return file.model_copy(update={"clouds": tuple(clouds)})


@functools.partial(jax.jit, static_argnums=0)
def _hits(config: Any, base: Any, adapter: Any, rows: Batch) -> tuple[jax.Array, jax.Array]:
    """Answer tokens that are the likeliest, and all of them, by row."""
    logits_BxTxV = apply(config, base, adapter, rows.tokens_BxT, rows.segments_BxT)
    asked_BxU = jnp.asarray(rows.loss_mask_BxT)[:, 1:]
    right_BxU = (jnp.argmax(logits_BxTxV[:, :-1], axis=-1) == rows.tokens_BxT[:, 1:]) & asked_BxU
    return right_BxU.sum(axis=1), asked_BxU.sum(axis=1)


def accuracy(federation: Federation, state: Any) -> tuple[float, float]:
    """Of the held-out rows of all clouds: tokens that are right, and answers all of whose are."""
    base, adapter = federation.model_of(state)
    right, asked = (
        np.concatenate(parts)
        for parts in zip(
            *(
                jax.device_get(_hits(federation.model.config, base, adapter, own.evaluation))
                for own in federation.participants
                if own.evaluation.loss_mask_BxT.any()
            ),
            strict=True,
        )
    )
    return float(right.sum() / asked.sum()), float(np.mean(right == asked))


def costs(federation: Federation) -> dict[str, list[float]]:
    """Bytes, seconds and dollars until each round is over, from the timeline."""
    calendar = federation.calendar
    bill = calendar.bill
    return {
        "bytes": np.cumsum((bill.up_NxC + bill.down_NxC).sum(axis=1)).tolist(),
        "seconds": [step.ready for step in calendar.timeline.steps],
        "dollars": np.cumsum(bill.clouds_NxC.sum(axis=1) + bill.server_N).tolist(),
    }


def train(federation: Federation) -> dict[str, list[float]]:
    """Loss and accuracy after each round."""
    found: dict[str, list[float]] = {"loss": [], "token_accuracy": [], "exact_match": []}
    state = federation.init()
    for _ in range(federation.steps):
        state, _ = federation.run_round(state)
        found["loss"].append(statistics.mean(federation.evaluate(state).values()))
        tokens, answers = accuracy(federation, state)
        found["token_accuracy"].append(tokens)
        found["exact_match"].append(answers)
    return found


def study(overrides: Sequence[str], seeds: int) -> list[Trace]:
    """All ways, seeds and bandwidths."""
    found = []
    for way in WAYS:
        for seed in range(seeds):
            learned: dict[str, list[float]] | None = None
            file, model, data = job(overrides, way, seed)
            for slower in SLOWER[: SLOWER.index(way.slowest) + 1]:
                federation = build.federation(with_links(file, slower), model, data)
                if learned is None or not federation.schedule.timely:
                    learned = train(federation)
                found.append(Trace(way.name, seed, slower, **learned, **costs(federation)))
                last = found[-1]
                print(
                    f"{way.name:<32} seed {seed} / {slower}: loss {last.loss[-1]:.3f}, tokens "
                    f"{last.token_accuracy[-1]:.1%}, exact {last.exact_match[-1]:.1%}, "
                    f"{last.bytes[-1] / 1e6:.1f} MB",
                    flush=True,
                )
    return found


def until(trace: Trace, target: float, what: str) -> float:
    """What a run has spent when its loss is at most the target; infinite if it never is."""
    values: list[float] = getattr(trace, what)
    return next((v for v, loss in zip(values, trace.loss, strict=True) if loss <= target), np.inf)


def target_of(found: Sequence[Trace], seed: int) -> float:
    """The loss with which federated averaging ends, and the margin."""
    return MARGIN + next(t.loss[-1] for t in found if t.way == WAYS[0].name and t.seed == seed)


def table(found: Sequence[Trace]) -> str:
    """Markdown: final loss and accuracy, and what it takes to be level with federated averaging."""
    wide = [f"time / {slower}" for slower in SLOWER] + [f"$ / {slower}" for slower in SLOWER]
    lines = [
        "| | loss | tokens | exact | MB to target | " + " | ".join(wide) + " |",
        "|---" * (5 + len(wide)) + "|",
    ]
    for way in WAYS:
        own = [t for t in found if t.way == way.name]
        first = [t for t in own if t.slower == SLOWER[0]]
        cells = [
            f"{statistics.mean(t.loss[-1] for t in first):.3f}",
            f"{statistics.mean(t.token_accuracy[-1] for t in first):.1%}",
            f"{statistics.mean(t.exact_match[-1] for t in first):.1%}",
            _mean([until(t, target_of(found, t.seed), "bytes") / 1e6 for t in first]),
        ]
        for what, scale in (("seconds", 1.0), ("dollars", 1e2)):
            for slower in SLOWER:
                same = [t for t in own if t.slower == slower]
                cells.append(
                    _mean([until(t, target_of(found, t.seed), what) * scale for t in same])
                )
        lines.append(f"| {way.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    """Empty where it has not been run, a dash where the target was not reached."""
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.3g}" if np.isfinite(mean) else "-"


def plot(found: Sequence[Trace], path: Path) -> None:
    """Loss against local steps, bytes and time; time and money to the target against bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    colours = plt.get_cmap("tab10")
    for place, way in enumerate(WAYS):
        own = [t for t in found if t.way == way.name]
        style: dict[str, Any] = {"color": colours(place), "label": way.name}
        # Lines of this framework's own ways are the thick ones.
        style["lw"] = 2.2 if way.source.startswith("ours") else 1.2

        def curve(slower: int, what: str, own: list[Trace] = own) -> tuple[Any, Any]:
            same = [t for t in own if t.slower == slower]
            across = [getattr(t, what) for t in same]
            return np.mean(across, axis=0), np.mean([t.loss for t in same], axis=0)

        loss = curve(1, "bytes")[1]
        axes[0, 0].plot(np.arange(1, len(loss) + 1) / way.rounds, loss, **style)
        bytes_, loss = curve(1, "bytes")
        axes[0, 1].plot(bytes_ / 1e6, loss, **style)
        accuracy_ = np.mean([t.token_accuracy for t in own if t.slower == 1], axis=0)
        axes[0, 2].plot(bytes_ / 1e6, 100 * accuracy_, **style)
        seconds, loss = curve(100, "seconds")
        axes[1, 0].plot(seconds, loss, **style)
        for axis, what in ((axes[1, 1], "seconds"), (axes[1, 2], "dollars")):
            spent = [
                np.mean(
                    [until(t, target_of(found, t.seed), what) for t in own if t.slower == slower]
                )
                for slower in SLOWER[: SLOWER.index(way.slowest) + 1]
            ]
            axis.plot(SLOWER[: len(spent)], spent, marker="o", ms=3, **style)
    titles = (
        (axes[0, 0], "convergence", "rounds of federated averaging", "held-out loss, nats"),
        (axes[0, 1], "bytes", "MB, both ways", "held-out loss, nats"),
        (axes[0, 2], "accuracy", "MB, both ways", "held-out answer tokens right, %"),
        (axes[1, 0], "bandwidth / 100", "virtual seconds", "held-out loss, nats"),
        (
            axes[1, 1],
            f"time to averaging's loss + {MARGIN} nats",
            "bandwidth divided by",
            "s",
        ),
        (axes[1, 2], "money to the same", "bandwidth divided by", "dollars"),
    )
    for axis, title, x, y in titles:
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if axis is not axes[0, 0]:
            axis.set_xscale("log")
    for axis in (axes[1, 1], axes[1, 2]):
        axis.set_yscale("log")
        axis.set_xticks(SLOWER, [str(slower) for slower in SLOWER])
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Runs the study, writes results.json and study.png, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    parser.add_argument("--again", action="store_true", help="trains nothing")
    given = parser.parse_args()
    if given.again:
        found = [
            Trace(**run) for run in json.loads((given.out / "results.json").read_text())["runs"]
        ]
        plot(found, given.out / "study.png")
        print(table(found))
        return
    started = time.perf_counter()
    try:
        found = study(given.set, given.seeds)
    except UserError as error:
        sys.exit(f"study: {error}")
    results = {"seconds": time.perf_counter() - started, "runs": [vars(t) for t in found]}
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.5g}"))
    (given.out / "results.json").write_text(json.dumps(rounded) + "\n")
    plot(found, given.out / "study.png")
    print(table(found))
    print(f"{results['seconds']:,.0f} s")


if __name__ == "__main__":
    main()
