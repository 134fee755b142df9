"""Aggregation rules: exactness, what the server pays for them, and robustness on a real model.

    command   python experiments/benchmarks/aggregation.py [--part PART] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

- Exactness: every rule that says it is exact plays six rounds, so that each of its phases is
  reached, of eight clients of unequal weights and ranks; each round's product is compared with the
  weighted mean of the clients' products in float64.
- Server: from the arrival of ten clients' int32 messages to the next state: the sums of all
  stages, decoding, `rule.between` and `rule.apply`, compiled, at d = 4096, rank 16, 32 layers of
  four matrices. Ten clients really write the messages (start, random change, fixed point). A rule
  and factor averaging take turns, and the median of the ratios counts.
  No program may hold an array with two axes of d, which its text shows.
- Robustness: ten clients train stories260K on Dolly's and Alpaca's texts through a run file; two of
  them send -10 times their update.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
MODEL = SHARED / "models" / "stories260K"
CLIENTS = 10
WIDTH, RANK, LAYERS = 4096, 16, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Distinct clients among the ten; each message is there five times, which no cost depends on.
WRITERS = 2
YARDSTICK = "factor-averaging"
Row = dict[str, Any]


def row(
    name: str, measured: float, unit: str, bar: float | None = None, least: bool = False
) -> Row:
    """One figure; ``least`` marks a bar that must be reached rather than not be passed."""
    met = None if bar is None else bool(measured >= bar if least else measured <= bar)
    return {"name": name, "measured": measured, "bar": bar, "unit": unit, "met": met}


# Exactness.


def part_exact() -> list[Row]:
    """The largest error of each exact rule over its rounds."""
    import numpy as np

    from fedjax_llm.aggregation import RULES

    rows = []
    for name, kind in RULES.items():
        if kind.facts.exact:
            errors = list(_errors(name, np.random.default_rng(1), rounds=6))
            rows.append(row(f"{name}: largest relative error of six rounds", max(errors), "", 1e-5))
    return rows


def _errors(name: str, draw: Any, rounds: int) -> Iterator[float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from fedjax_llm.aggregation import RULES, LocalResult, Round

    rule = RULES[name](optax.sgd(1.0))
    ranks = (8, 8, 4, 2, 8, 1, 8, 6)
    weights = draw.uniform(0.1, 1.0, len(ranks))
    shares = weights / weights.sum()
    shares_K = jnp.asarray(shares, jnp.float32)
    server = rule.init(_adapter(draw, ("q_proj", "v_proj"), 2, 256, 192, 8))

    def dense(adapter: Any) -> dict[str, Any]:
        return {
            projection: adapter.scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
            for projection, (a, b) in adapter.factors.items()
        }

    for number in range(1, rounds + 1):
        key = jax.random.fold_in(jax.random.key(0), number)
        round_ = Round(server, rule.phase(number), jnp.int32(number), key)
        results = []
        for rank in map(jnp.int32, ranks):
            start = rule.start(round_, rank)
            moved = jax.tree.map(
                lambda leaf: (
                    leaf + jnp.asarray(0.1 * draw.standard_normal(leaf.shape), jnp.float32)
                ),
                start,
            )
            results.append(LocalResult(start, rule.limited(start, moved, rank), rank))
        shared: Any = ()
        for stage in range(rule.stages):
            sent = [rule.message(round_, result, stage, shared) for result in results]
            sent_K = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sent)
            if rule.needs_individual_messages:
                after = rule.apply_each(round_, sent_K, shares_K, jnp.asarray(ranks, jnp.int32))
                break
            mean = jax.tree.map(lambda leaf_K: jnp.tensordot(shares_K, leaf_K, 1), sent_K)
            if stage + 1 < rule.stages:
                shared = rule.between(round_, stage, mean)
            else:
                after = rule.apply(round_, mean, shared)
        products = [dense(rule.adapter(server, result.after)) for result in results]
        found, apart, size = dense(after.adapter), 0.0, 0.0
        for projection in found:
            folded = found[projection]
            if after.residual:
                folded = folded + np.asarray(after.residual[projection], np.float64)
                folded = folded - np.asarray(server.residual[projection], np.float64)
            truth = sum(
                share * product[projection] for share, product in zip(shares, products, strict=True)
            )
            apart += np.sum(np.square(folded - truth))
            size += np.sum(np.square(truth))
        yield float(np.sqrt(apart / size))
        server = after


def _adapter(draw: Any, names: tuple[str, ...], layers: int, inputs: int, outputs: int, rank: int):
    """Neither factor zero, as after some rounds."""
    import jax.numpy as jnp
    import numpy as np

    from fedjax_llm.lora import Adapter, LowRank

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.standard_normal(shape, np.float32) / np.float32(inputs) ** 0.5)

    return Adapter(
        {
            name: LowRank(normal(layers, inputs, rank), normal(layers, rank, outputs))
            for name in names
        },
        2.0,
    )


# The server's part of a round.


class Server(NamedTuple):
    """A rule's server, compiled, and the arrays that a round of it reads.

    Attributes:
        run: one round from messages to state.
        compiled: its programs.
        messages: int32 [K, P] of each stage.
        state: that was broadcast.
    """

    run: Callable[[], Any]
    compiled: list[Any]
    messages: list[Any]
    state: Any


def open_server(name: str, phase: int, width: int = WIDTH, layers: int = LAYERS) -> Server:
    """Has ten clients write a round's messages and compiles what the server does with them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from fedjax_llm.aggregation import RULES, LocalResult, Round
    from fedjax_llm.federation.message import MessageCodec, WeightCodec, fitting_bits

    rule = RULES[name](optax.sgd(1.0))
    draw = np.random.default_rng(0)
    state = rule.init(_adapter(draw, PROJECTIONS, layers, width, width, RANK))
    if name == "fed-sb" and phase == 2:
        # R and the bases as the round of A leaves them.
        zero = jax.tree.map(jnp.zeros_like, rule.trainable(state, 1))
        state = rule.apply(Round(state, 1, jnp.int32(2), jax.random.key(0)), zero)
    key, number = jax.random.key(1), jnp.int32(phase + 1)
    inverse = jnp.float32(1 / CLIENTS)
    barrier = jax.lax.optimization_barrier

    @jax.jit
    def trained(state: Any, key: jax.Array) -> LocalResult:
        start = rule.start(Round(state, phase, number, key), jnp.int32(RANK))
        leaves, tree = jax.tree.flatten(start)
        keys = jax.random.split(key, len(leaves))
        size = jnp.float32(0.1 * width**-0.5)
        moved = [
            leaf + size * jax.random.normal(each, leaf.shape)
            for leaf, each in zip(leaves, keys, strict=True)
        ]
        return LocalResult(start, jax.tree.unflatten(tree, moved), jnp.int32(RANK))

    messages, compiled, codecs, answers = [], [], [], [()]
    for stage in range(rule.stages):

        def tree_of(state: Any, result: LocalResult, shared: Any, stage: int = stage) -> Any:
            return rule.message(Round(state, phase, number, key), result, stage, shared)

        shape = rule.messages(state, phase)[0][stage]
        ints_KxP = None
        for client in range(WRITERS):
            result = trained(state, jax.random.fold_in(key, client))
            if ints_KxP is None:
                squares = [
                    jnp.sum(jnp.square(leaf))
                    for leaf in jax.tree.leaves(jax.jit(tree_of)(state, result, answers[-1]))
                ]
                bound = 1.25 * float(jnp.sqrt(jnp.sum(jnp.stack(squares))))
                codec = MessageCodec.for_tree(
                    shape, max_norm=bound, bits=fitting_bits(None, CLIENTS), clients=CLIENTS
                )
                encode = jax.jit(
                    lambda state, result, shared, codec=codec, tree_of=tree_of: (
                        codec.encode(tree_of(state, result, shared)).ints_P
                    )
                )
                ints_KxP = np.empty((CLIENTS, codec.size), np.int32)
            ints_KxP[client::WRITERS] = encode(state, result, answers[-1])
        assert ints_KxP is not None and np.any(ints_KxP)
        codecs.append(codec)
        messages.append(jax.device_put(ints_KxP))
        del ints_KxP

        def step(
            ints_KxP: jax.Array,
            limbs_Kx4: jax.Array,
            state: Any,
            shared: Any,
            key: jax.Array,
            inverse: jax.Array,
            stage: int = stage,
            codec: MessageCodec = codec,
        ) -> Any:
            """As `RoundPrograms.total`, `_between` and `_apply`."""
            round_ = Round(state, phase, number, key)
            if rule.needs_individual_messages:
                uploads_K = jax.vmap(lambda ints: codec.unravel(codec.decode(ints)))(ints_KxP)
                shares_K = jnp.full(CLIENTS, inverse)
                return rule.apply_each(
                    round_, uploads_K, shares_K, jnp.full(CLIENTS, RANK, jnp.int32)
                )
            total_P = barrier(jnp.sum(ints_KxP, axis=0, dtype=jnp.int32))
            if rule.weighs_by_result:
                # Clients have multiplied by their weights already; the server sums these apart.
                total_4 = barrier(jnp.sum(limbs_Kx4, axis=0, dtype=jnp.int32))
                inverse = inverse * jnp.minimum(jnp.float32(1), 1 / WeightCodec.decode(total_4))
            mean = barrier(codec.unravel(codec.decode(total_P) * inverse))
            if stage + 1 < rule.stages:
                return rule.between(round_, stage, mean)
            return rule.apply(round_, mean, shared)

        limbs_Kx4 = jnp.full((CLIENTS, WeightCodec.LIMBS), 1, jnp.int32)
        arguments = (messages[-1], limbs_Kx4, state, answers[-1], key, inverse)
        compiled.append(jax.jit(step).lower(*arguments).compile())
        if stage + 1 < rule.stages:
            answers.append(compiled[-1](*arguments))

    def run() -> Any:
        shared: Any = ()
        for stage in range(rule.stages):
            shared = compiled[stage](messages[stage], limbs_Kx4, state, shared, key, inverse)
        return jax.block_until_ready(shared)

    return Server(run, compiled, messages, state)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _against(one: Server, other: Server, repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, which take turns, and the median of the ratios of each turn."""
    one.run(), other.run()
    turns = [(_seconds(one.run), _seconds(other.run)) for _ in range(repeats)]
    first, second = (statistics.median(times) for times in zip(*turns, strict=True))
    return first, second, statistics.median(x / y for x, y in turns)


def wide_shapes(programs: list[Any], width: int) -> int:
    """Arrays in compiled programs that have two axes of d or more."""
    found = set()
    for program in programs:
        for shape in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text()):
            if sum(int(axis) >= width for axis in shape.split(",")) > 1:
                found.add(shape)
    return len(found)


def part_server(repeats: int = 7) -> list[Row]:
    """The time of every additive rule, next to factor averaging."""
    from fedjax_llm.aggregation import RULES

    yardstick = open_server(YARDSTICK, 0)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    own = []
    wide = wide_shapes(yardstick.compiled, WIDTH)
    for name, kind in RULES.items():
        if kind.needs_individual_messages or name == YARDSTICK:
            continue
        for phase in range(len(kind.phases)):
            server = open_server(name, phase)
            wide += wide_shapes(server.compiled, WIDTH)
            seconds, base, ratio = _against(server, yardstick, repeats)
            own.append(base)
            what = name if len(kind.phases) == 1 else f"{name}, phase {phase + 1}"
            ratios[what] = ratio
            rows.append(row(f"server, {what}", seconds * 1e3, "ms"))
            rows.append(row(f"server, {what}: times factor averaging", ratio, "x", 3))
            del server
    costliest = max(ratios, key=lambda what: ratios[what])
    return [
        row(f"server, {YARDSTICK}", statistics.median(own) * 1e3, "ms"),
        *rows,
        row(f"server, the costliest ({costliest})", ratios[costliest], "x", 3),
        row("server: arrays with two axes of d in the programs of additive rules", wide, "", 0),
    ]


RUN_FILE = """\
name = "robust"
seed = 5
rounds = 12
model = {{ path = "{model}" }}
adapter = {{ rank = 8, alpha = 16.0, targets = ["all-linear"] }}
training = {{ local_steps = 4, batch_size = 8, microbatch = 8, sequence_length = 48, \
optimizer = "adam", learning_rate = 3e-3, template = "plain" }}
# So large that shortening messages, a defence of its own, plays no part.
secure = {{ update_bound = 1000.0 }}
evaluation = {{ examples_per_cloud = 64, aggregation_error = false }}

[[clouds]]
name = "honest"
clients = 8
data = {{ sources = ["{data}/general/dolly15k.jsonl.gz"], limit = 900, \
mapping = {{ prompt = "prompt", answer = "answer" }} }}

[[clouds]]
name = "malicious"
clients = 2
data = {{ sources = ["{data}/general/alpaca_en_demo.jsonl.gz"], limit = 240, \
mapping = {{ prompt = "prompt", answer = "answer" }} }}
"""
ATTACK = 'attack={name="sign-flip", clouds=["malicious"], scale=10.0}'
ROBUST = ("krum", "multi-krum", "median", "trimmed-mean", "geometric-median", "centred-clipping")


def part_robust() -> list[Row]:
    """Final held-out loss of the honest clients' text, with two of ten flipping signs."""
    from fedjax_llm.errors import UserError
    from fedjax_llm.runs import build, runfile

    if not MODEL.is_dir():
        print(f"robustness: left out, {MODEL} is not there")
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "robust.toml"
        file.write_text(RUN_FILE.format(model=MODEL, data=SHARED / "data"))
        base = build.model(runfile.load(file), lambda event: None)
        corpora = build.corpora(runfile.load(file), base, lambda event: None)

        def final(*settings: str) -> tuple[float, float]:
            run_file = runfile.load(file, settings)
            federation = build.federation(run_file, base, corpora)
            state = federation.init()
            before = federation.evaluate(state)["honest"]
            try:
                for after, _ in federation.rounds(state, run_file.rounds):
                    state = after
            except UserError:  # an update that is not finite
                return before, float("inf")
            return before, federation.evaluate(state)["honest"]

        before, clean = final()
        rows = [
            row("robust: loss before training", before, "nats"),
            row("robust: clean run, mean", clean, "nats"),
            row("robust: mean under attack, over clean", final(ATTACK)[1] / clean, "x", 1.5, True),
        ]
        for combine in ROBUST:
            settings = [f"aggregation.combine={combine}"]
            if combine in ("krum", "multi-krum", "trimmed-mean"):
                settings.append("aggregation.byzantine=2")
            ratio = final(ATTACK, *settings)[1] / clean
            rows.append(row(f"robust: {combine} under attack, over clean", ratio, "x", 1.1))
        return rows


PARTS = {"exact": part_exact, "server": part_server, "robust": part_robust}


def main() -> None:
    """Runs each part in a process of its own, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="this one only, in this process")
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args()
    if given.part:
        rows = PARTS[given.part]()
    else:
        rows = []
        for part in PARTS:
            with tempfile.NamedTemporaryFile(suffix=".json") as own:
                command = [sys.executable, __file__, "--part", part, "--json", own.name]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                rows += json.loads(Path(own.name).read_text())
    for found in rows:
        bar = "" if found["bar"] is None else f"bar {found['bar']:g}"
        met = {None: "", True: "met", False: "MISSED"}[found["met"]]
        print(f"{found['name']:66} {found['measured']:12.4g} {found['unit']:5} {bar:10} {met}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
