"""Aggregation rules: exactness, what the server pays for them, and robustness on a real model.

    command   python experiments/benchmarks/aggregation.py [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Every part runs in a process of its own, LAPACK on one thread (`OPENBLAS_NUM_THREADS=1`: on matrices
of 16 to 32 rows its threads only wait for each other, which next to other programs takes seconds).

- Exactness: every rule that says it is exact plays six rounds, so that each of its phases is
  reached, of eight clients of unequal weights and ranks; the product after each is compared with
  the weighted mean of the clients' products in float64.
- Server: from the arrival of ten clients' int32 messages to the next state: the sums of all
  stages, decoding, `rule.between` and `rule.apply`, compiled, at d = 4096, rank 16, 32 layers of
  four matrices. Clients really write the messages (start, random change, fixed point). Every rule
  takes turns with factor averaging; what counts is the median of the ratios of a turn. Clients of
  HetLoRA weigh their own messages: the server adds the weights.
- Memory: what the costliest server step takes beyond messages and state, in a process of its own;
  and whether a compiled program holds an array with two axes of d.
- Growth: the server's time at d = 1024 to 8192, and the exponent fitted to it.
- Robustness: ten clouds train stories260K on the lines of Shakespeare's roles, dealt in turn, rule
  ffa, through a run file; two clouds send -10 times their update. update_bound is 1000, so that no
  clip does the work of the defence; 1 for `normalised`, whose honest messages have that length:
  there the clip is the defence. Left out without the model and the text in the shared folder
  (FEDJAX_LLM_SHARED).
"""

import argparse
import ctypes
import gzip
import json
import math
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

from table import Row, row, show, write

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
TEXT = SHARED / "data" / "lm_text" / "shakespeare_by_role.jsonl.gz"
MODEL = SHARED / "models" / "stories260K"
CLIENTS = 10
WIDTH, RANK, LAYERS = 4096, 16, 32
WIDTHS = (1024, 2048, 4096, 8192)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Distinct clients among the ten; each message is there five times, which no cost depends on.
WRITERS = 2
YARDSTICK = "factor-averaging"


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


def _adapter(
    draw: Any, names: tuple[str, ...], layers: int, inputs: int, outputs: int, rank: int
) -> Any:
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
        compiled: its programs, one for each stage.
        messages: int32 [K, P] of each stage.
    """

    run: Callable[[], Any]
    compiled: list[Any]
    messages: list[Any]


def open_server(name: str, phase: int, width: int = WIDTH, layers: int = LAYERS) -> Server:
    """Has ten clients write a round's messages and compiles what the server does with them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from fedjax_llm.aggregation import RULES, Round
    from fedjax_llm.federation.message import WeightCodec

    rule = RULES[name](optax.sgd(1.0))
    key = jax.random.key(1)
    adapter = _adapter(np.random.default_rng(0), PROJECTIONS, layers, width, width, RANK)
    state = rule.init(adapter)
    if name == "fed-sb" and phase == 2:
        # R and the bases as the round before leaves them.
        nothing = jax.tree.map(jnp.zeros_like, rule.trainable(state, 1))
        state = rule.apply(Round(state, 1, jnp.int32(2), key), nothing)
    limbs_Kx4 = jnp.ones((CLIENTS, WeightCodec.LIMBS), jnp.int32)
    inverse = jnp.float32(1 / CLIENTS)
    compiled, messages, shared = [], [], ()
    for stage in range(rule.stages):
        codec, ints_KxP = _messages(
            rule, Round(state, phase, jnp.int32(phase + 1), key), stage, shared
        )
        step = jax.jit(_step(rule, phase, stage, codec))
        arguments = (ints_KxP, limbs_Kx4, state, shared, key, inverse)
        compiled.append(step.lower(*arguments).compile())
        messages.append(ints_KxP)
        if stage + 1 < rule.stages:
            shared = compiled[stage](*arguments)

    def run() -> Any:
        shared: Any = ()
        for program, ints_KxP in zip(compiled, messages, strict=True):
            shared = program(ints_KxP, limbs_Kx4, state, shared, key, inverse)
        return jax.block_until_ready(shared)

    return Server(run, compiled, messages)


def _messages(rule: Any, round_: Any, stage: int, shared: Any) -> tuple[Any, Any]:
    """The codec of a stage and int32 [K, P], what clients send after random changes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.flatten_util import ravel_pytree

    from fedjax_llm.aggregation import LocalResult
    from fedjax_llm.federation.message import MessageCodec, fitting_bits

    phase = round_.phase

    @jax.jit
    def message_P(server: Any, shared: Any, key: jax.Array) -> jax.Array:
        own = round_._replace(server=server)
        start = rule.start(own, jnp.int32(RANK))
        flat_P, unravel = ravel_pytree(start)
        size = 0.1 * jnp.sqrt(jnp.mean(jnp.square(flat_P)) + jnp.float32(1e-6))
        moved = unravel(flat_P + size * jax.random.normal(key, flat_P.shape))
        result = LocalResult(start, moved, jnp.int32(RANK))
        return ravel_pytree(rule.message(own, result, stage, shared))[0]

    codec = None
    for client in range(WRITERS):
        key = jax.random.fold_in(round_.key, client)
        sent_P = message_P(round_.server, shared, key)
        if codec is None:
            codec = MessageCodec.for_tree(
                rule.messages(round_.server, phase)[0][stage],
                max_norm=1.25 * float(jnp.linalg.norm(sent_P)),
                bits=fitting_bits(None, CLIENTS),
                clients=CLIENTS,
            )
            ints_KxP = np.empty((CLIENTS, codec.size), np.int32)
        ints_KxP[client::WRITERS] = codec.encode(sent_P).ints_P
    return codec, jax.device_put(ints_KxP)


def _step(rule: Any, phase: int, stage: int, codec: Any) -> Callable[..., Any]:
    """What the server makes of the messages of a stage, as `RoundPrograms` does."""
    import jax
    import jax.numpy as jnp

    from fedjax_llm.aggregation import Round
    from fedjax_llm.federation.message import WeightCodec

    barrier = jax.lax.optimization_barrier

    def step(
        ints_KxP: jax.Array,
        limbs_Kx4: jax.Array,
        state: Any,
        shared: Any,
        key: jax.Array,
        inverse: jax.Array,
    ) -> Any:
        round_ = Round(state, phase, jnp.int32(phase + 1), key)
        if rule.needs_individual_messages:
            uploads_K = jax.vmap(lambda ints: codec.unravel(codec.decode(ints)))(ints_KxP)
            ranks_K = jnp.full(CLIENTS, RANK, jnp.int32)
            return rule.apply_each(round_, uploads_K, jnp.full(CLIENTS, inverse), ranks_K)
        total_P = barrier(jnp.sum(ints_KxP, axis=0, dtype=jnp.int32))
        mean = barrier(codec.unravel(codec.decode(total_P) * inverse))
        if stage + 1 < rule.stages:
            return rule.between(round_, stage, mean)
        after = rule.apply(round_, mean, shared)
        if rule.weighs_by_result:
            total_4 = jnp.sum(limbs_Kx4, axis=0, dtype=jnp.int32)
            return after, 1 / WeightCodec.decode(total_4)
        return after

    return step


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _against(one: Server, other: Server, repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, which take turns, and the median of the ratios of each turn."""
    one.run()
    other.run()
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


def part_server(repeats: int) -> list[Row]:
    """The time of every additive rule, next to factor averaging."""
    from fedjax_llm.aggregation import RULES

    yardstick = open_server(YARDSTICK, 0)
    rows: list[Row] = []
    ratios: dict[tuple[str, int], float] = {}
    own = []
    wide = wide_shapes(yardstick.compiled, WIDTH)
    for name, kind in RULES.items():
        if kind.needs_individual_messages or name == YARDSTICK:
            continue
        for phase in range(len(kind.phases)):
            server = open_server(name, phase)
            wide += wide_shapes(server.compiled, WIDTH)
            seconds, base, ratio = _against(server, yardstick, repeats)
            del server
            own.append(base)
            ratios[name, phase] = ratio
            rows.append(row(f"server, {_phase(name, phase)}", seconds * 1e3, "ms"))
            rows.append(row(f"server, {_phase(name, phase)}: times {YARDSTICK}", ratio, "x", 3))
    costliest = max(ratios, key=lambda which: ratios[which])
    named = f"server, the costliest additive rule: {_phase(*costliest)}"
    return [
        row(f"server, {YARDSTICK}", statistics.median(own) * 1e3, "ms"),
        *rows,
        row(named, ratios[costliest], "x", 3),
        row("server: arrays with two axes of d, in all programs", wide, "", 0),
    ]


def _phase(name: str, phase: int) -> str:
    from fedjax_llm.aggregation import RULES

    return name if len(RULES[name].phases) == 1 else f"{name}, phase {phase + 1}"


def part_memory(name: str, phase: int) -> list[Row]:
    """What one server step takes beyond what is there before it; compiled and run once before.

    On Linux with the GNU C library, whose process accounts and allocator it asks.
    """
    server = open_server(name, phase)
    server.run()
    ctypes.CDLL(None).malloc_trim(0)  # what the first run has freed is not resident any more
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from there
    result = server.run()
    grown = _status("VmHWM") - before
    del result
    analyses = [program.memory_analysis() for program in server.compiled]
    temporary = max(analysis.temp_size_in_bytes for analysis in analyses)
    outputs = sum(analysis.output_size_in_bytes for analysis in analyses)
    messages = sum(array.nbytes for array in server.messages)
    stack = 4 * LAYERS * len(PROJECTIONS) * WIDTH**2
    return [
        row(f"memory, {name}: messages", messages / 1e9, "GB"),
        row(f"memory, {name}: peak of a step above messages and state", grown / 1e9, "GB"),
        row(f"memory, {name}: of it temporary, by the compiler", temporary / 1e9, "GB"),
        row(f"memory, {name}: of it results of all stages", outputs / 1e9, "GB"),
        row("memory: one d x d array for every matrix, for comparison", stack / 1e9, "GB"),
    ]


def _status(field: str) -> int:
    """Bytes, from this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith(field)]
    return int(line.split()[1]) * 1024


def part_growth(name: str, layers: int, repeats: int) -> list[Row]:
    """Seconds against d, all widths in turn."""
    servers = {width: open_server(name, 0, width, layers) for width in WIDTHS}
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    for server in servers.values():
        server.run()
    for _ in range(repeats):
        for width, server in servers.items():
            times[width].append(_seconds(server.run))
    seconds = {width: statistics.median(each) for width, each in times.items()}
    logs = [math.log(width) for width in WIDTHS]
    slope = statistics.linear_regression(logs, [math.log(seconds[w]) for w in WIDTHS]).slope
    wide = sum(wide_shapes(server.compiled, width) for width, server in servers.items())
    return [
        *(
            row(f"growth, {name}: d = {w}, {layers} layers", s * 1e3, "ms")
            for w, s in seconds.items()
        ),
        row(f"growth, {name}: exponent of d", slope, ""),
        row(f"growth, {name}: arrays with two axes of d", wide, "", 0),
    ]


# Robustness, on a real model.

RUN_FILE = """\
name = "robust"
seed = 5
rounds = 6

[model]
path = {model}

[adapter]
rank = 8
alpha = 16.0
targets = ["*_proj"]

[training]
local_steps = 8
batch_size = 8
microbatch = 8
sequence_length = 64
template = "plain"
optimizer = "adam"
learning_rate = 1e-2

[privacy]
unit = "none"
sampling = "fixed"

[aggregation]
rule = "ffa"

[secure]
update_bound = 1000.0

[evaluation]
examples_per_cloud = 24
microbatch = 24
aggregation_error = false
"""
CLOUD = """
[[clouds]]
name = "cloud{number}"
data = {{ sources = [{source}], mapping = {{ prompt = "{{client}}:", answer = "text" }} }}
"""
ATTACK = 'attack={name="sign-flip", clouds=["cloud0", "cloud1"], scale=10.0}'
# Two of ten clouds are malicious. Radius and rate are of the size of an update, 1 to 3.5.
DEFENCES = {
    "krum": ["aggregation.byzantine=2"],
    "multi-krum": ["aggregation.byzantine=2"],
    "median": [],
    "trimmed-mean": ["aggregation.byzantine=2"],
    "geometric-median": [],
    "centred-clipping": ["aggregation.radius=2.0"],
    "normalised": ["aggregation.server_learning_rate=2.0", "secure.update_bound=1.0"],
}


def part_robust(folder: Path) -> list[Row]:
    """Held-out loss after six rounds, without an attack, and under it with each defence."""
    path = _write_run(folder)
    start, clean = _losses(path, [])
    rows = [
        row("robust: loss before training", start, "nats"),
        row("robust: loss of the mean, no attack", clean, "nats"),
    ]
    _, attacked = _losses(path, [ATTACK])
    rows += [
        row("robust: loss of the mean under attack", attacked, "nats"),
        # Not a number where a client's training overflowed, which the run refuses.
        row("robust: the same over the clean loss", attacked / clean, "x", 1.5, least=True),
    ]
    runs = {name: [f"aggregation.combine={name}", *own] for name, own in DEFENCES.items()}
    runs["median of five groups"] = ["aggregation.combine=median", "aggregation.groups=5"]
    for name, overrides in runs.items():
        _, loss = _losses(path, [ATTACK, *overrides])
        rows.append(row(f"robust: {name}, loss under attack over clean", loss / clean, "x", 1.1))
    return rows


def _write_run(folder: Path) -> Path:
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        spoken = [line for line in lines if 60 <= len(json.loads(line)["text"]) <= 160][:2000]
    text = RUN_FILE.format(model=json.dumps(str(MODEL)))
    for number in range(CLIENTS):
        source = folder / f"cloud{number}.jsonl"
        source.write_text("".join(spoken[number::CLIENTS]), encoding="utf-8")
        text += CLOUD.format(number=number, source=json.dumps(str(source)))
    path = folder / "robust.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _losses(path: Path, overrides: list[str]) -> tuple[float, float]:
    """Mean held-out loss of all clouds before and after; infinite where the run gave up."""
    from fedjax_llm.errors import FedJaxError
    from fedjax_llm.runs import build, runfile

    run_file = runfile.load(path, overrides)
    model = build.model(run_file, lambda event: None)
    corpora = build.corpora(run_file, model, lambda event: None)
    federation = build.federation(run_file, model, corpora)
    state = federation.init()
    before = statistics.mean(federation.evaluate(state).values())
    try:
        for _ in range(run_file.rounds):
            state, _ = federation.run_round(state)
    except FedJaxError as error:
        print(f"robust: {error}", file=sys.stderr)
        return before, math.inf
    after = statistics.mean(federation.evaluate(state).values())
    return before, after if math.isfinite(after) else math.inf


# The command.


def in_process(part: str, *arguments: str) -> list[Row]:
    """Runs one part in a fresh process and returns its rows."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--part", part, "--json", str(out), "--folder", folder]
        subprocess.run([*command, *arguments], check=True, env=environment)
        rows: list[Row] = json.loads(out.read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--repeats", type=int, default=7, help="of each timing, in turns")
    parser.add_argument("--part", choices=["exact", "server", "memory", "growth", "robust"])
    parser.add_argument("--rule", default="fedask")
    parser.add_argument("--phase", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.part:
        parts = {
            "exact": part_exact,
            "server": lambda: part_server(given.repeats),
            "memory": lambda: part_memory(given.rule, given.phase - 1),
            "growth": lambda: part_growth(given.rule, given.layers, 5),
            "robust": lambda: part_robust(given.folder),
        }
        rows = parts[given.part]()
    else:
        rows = in_process("exact")
        rows += in_process("server", "--repeats", str(given.repeats))
        (costliest,) = [each["name"] for each in rows if "the costliest" in each["name"]]
        rule, _, phase = costliest.split(": ")[1].partition(", phase ")
        rows += in_process("memory", "--rule", rule, "--phase", phase or "1")
        for name, layers in (("fedask", 8), ("flexlora", 1)):
            rows += in_process("growth", "--rule", name, "--layers", str(layers))
        if MODEL.is_dir() and TEXT.exists():
            rows += in_process("robust")
        else:
            print(f"robustness: left out, {MODEL} or {TEXT} is not there", file=sys.stderr)
        show(rows)
    write(rows, given.json)


if __name__ == "__main__":
    main()
