"""What privacy costs, and how that compares with other libraries.

    command   python experiments/benchmarks/privacy.py [--part NAME] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Every part runs in a process of its own. Parts:

- clipping: a step of DP-SGD on stories15M (shared folder, FEDJAX_LLM_SHARED) with rank-8 LoRA on
  all seven linear projections, 16 examples of 128 random tokens, float32, both cores for whoever
  runs: XLA's default, and two threads for PyTorch. Everything is timed in one run in turns, twelve
  by default; what counts is the median of the ratios of a turn.
  - Step: Poisson sampling at rate one, gradients, clipping, noise and SGD, over the same without
    privacy (shuffled batches), each with the micro-batch that suits it best.
  - Memory: growth of the peak resident memory (VmHWM, reset after compiling) over the resident
    memory before the first step, all 16 examples in one micro-batch, each in its own process.
  - jax-privacy: `clipped_grad` on the same loss, the clipped sum alone, no noise.
  - Opacus: the same model and adapter in PyTorch (opacus_step.py), in the environment that
    make_opacus_env.sh makes (FEDJAX_LLM_OPACUS; left out where it is not there). The losses must
    agree to 1e-3. Its fastest way counts, all 16 examples at once, against ours at once.
  - Ghost: method "ghost" over method "vmap", for each kind; and where ranks are long against
    sequences (rank 64, 64 examples of 16 tokens).
- accounting, sensitivity, audit, shares: what is promised, checked; see privacy_checks.py.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import privacy_checks
from table import Row, row, show, write

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
MODEL = SHARED / "models" / "stories15M"
OPACUS = Path(
    os.environ.get("FEDJAX_LLM_OPACUS", Path(tempfile.gettempdir()) / "fedjax_llm_opacus")
)
CLIP, NOISE = 1.0, 1.0
MICROBATCHES = (4, 8, 16)


def in_turns(work: dict[Any, Callable[[], float]], turns: int) -> dict[Any, list[float]]:
    """Seconds that each piece of work reports, one turn after the other, after one to warm up."""
    for once in work.values():
        once()
    seconds: dict[Any, list[float]] = {name: [] for name in work}
    for turn in range(turns):
        # Every other turn backwards, so that nobody always follows the same neighbour.
        for name in list(work)[:: 1 if turn % 2 == 0 else -1]:
            time.sleep(0.1)  # threads of the last one spin for a while when they have nothing to do
            seconds[name].append(work[name]())
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of each turn."""
    return statistics.median(x / y for x, y in zip(over, under, strict=True))


def timed(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A call that waits for the result and returns its seconds."""
    import jax

    def once() -> float:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - started

    return once


# Clipping.


class Setting(NamedTuple):
    """Sizes of a step."""

    rank: int = 8
    batch: int = 16
    sequence: int = 128


class Problem(NamedTuple):
    """What all steps start from.

    Attributes:
        base: frozen weights.
        part: the trained factors.
        rows: `Batch` of [B, T] leaves.
        loss: (base, part, row) -> loss.
        losses: (base, part, rows) -> loss of each.
        scale: of the adapter.
    """

    base: Any
    part: Any
    rows: Any
    loss: Callable[..., Any]
    losses: Callable[..., Any]
    scale: float


def problem(setting: Setting) -> Problem:
    """Model, adapter with neither factor zero, and rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fedjax_llm.aggregation.part import pick, put
    from fedjax_llm.federation.objective import row_loss, rows_loss
    from fedjax_llm.lora import LoraConfig, init_adapter
    from fedjax_llm.models import Batch
    from fedjax_llm.models.model import load_model

    model = load_model(MODEL)
    draw = np.random.default_rng(0)
    lora = LoraConfig(setting.rank, 2.0 * setting.rank, ("all-linear",))
    adapter = init_adapter(model.config, lora, jax.random.key(0))
    part = pick(adapter, ("a", "b"))
    for sides in part.values():
        sides["b"] = jnp.asarray(0.02 * draw.standard_normal(sides["b"].shape), jnp.float32)
    shape = (setting.batch, setting.sequence)
    tokens = jnp.asarray(draw.integers(3, model.config.vocab_size, shape), jnp.int32)
    rows = Batch(tokens, jnp.ones(shape, bool), jnp.ones(shape, jnp.int32))

    def loss(base: Any, part: Any, row: Any) -> Any:
        return row_loss(model, base, put(adapter, part), row, jnp.float32, False)

    def losses(base: Any, part: Any, rows: Any) -> Any:
        return rows_loss(model, base, put(adapter, part), rows, jnp.float32, False)

    return Problem(model.base, part, rows, loss, losses, adapter.scale)


def step(of: Problem, microbatch: int, private: bool) -> Callable[[], float]:
    """One local step as training takes it, compiled."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjax_llm.training import ClientTable, ExamplePrivacy, LocalTraining, client_update
    from fedjax_llm.training.optimizers import optimizer_init

    batch = of.rows.tokens_BxT.shape[0]
    privacy = ExamplePrivacy(CLIP, NOISE) if private else None
    training = LocalTraining(optax.sgd(1e-3), 1, batch, microbatch, privacy)

    def run(base: Any, part: Any, state: Any, rows: Any, key: jax.Array) -> Any:
        table = ClientTable(rows, jnp.int32(batch), jnp.float32(1))
        losses = functools.partial(of.losses, base)
        trained = client_update(losses, training, part, state, table, key, key)
        return trained.trainable, trained.metrics

    arguments = (
        of.base,
        of.part,
        optimizer_init(training.optimizer, of.part),
        of.rows,
        jax.random.key(1),
    )
    return timed(jax.jit(run).lower(*arguments).compile(), *arguments)


def clipped_sum(of: Problem, kind: Any, method: str, microbatch: int) -> Callable[[], float]:
    """The clipped sum of all rows by this project."""
    import jax
    import jax.numpy as jnp

    from fedjax_llm.privacy import clipped_grad_sum, poisson_clipped_grad_sum

    batch = of.rows.tokens_BxT.shape[0]

    def run(base: Any, part: Any, rows: Any) -> Any:
        loss = functools.partial(of.loss, base)
        if microbatch == batch:
            return clipped_grad_sum(loss, part, rows, jnp.ones(batch), kind, method)
        indices = jnp.arange(batch, dtype=jnp.int32)
        return poisson_clipped_grad_sum(loss, part, rows, indices, batch, kind, microbatch, method)

    arguments = (of.base, of.part, of.rows)
    return timed(jax.jit(run).lower(*arguments).compile(), *arguments)


def their_sum(of: Problem, microbatch: int) -> Callable[[], float]:
    """The clipped sum of all rows by jax-privacy."""
    import jax
    from jax_privacy import clipping

    batch = of.rows.tokens_BxT.shape[0]

    def run(base: Any, part: Any, rows: Any) -> Any:
        clipped = clipping.clipped_grad(
            functools.partial(of.loss, base),
            l2_clip_norm=CLIP,
            keep_batch_dim=False,
            return_values=True,
            return_grad_norms=True,
            microbatch_size=None if microbatch == batch else microbatch,
        )
        return clipped(part, rows)

    arguments = (of.base, of.part, of.rows)
    return timed(jax.jit(run).lower(*arguments).compile(), *arguments)


class Opacus:
    """The process of opacus_step.py, which steps when it is told."""

    def __init__(self, of: Problem, folder: Path):
        import numpy as np

        inputs = folder / "inputs.npz"
        factors = {
            f"{name}.{side}": np.asarray(array)
            for name, sides in of.part.items()
            for side, array in sides.items()
        }
        tokens = np.asarray(of.rows.tokens_BxT)
        np.savez(inputs, tokens=tokens, scale=of.scale, clip=CLIP, noise=NOISE, **factors)
        command = [OPACUS / "bin" / "python", HERE / "opacus_step.py"]
        self.process = subprocess.Popen(
            [*command, "--model", MODEL, "--inputs", inputs, "--threads", "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.head = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("opacus_step.py ended early; its error stands above")
        return line

    def step(self, way: str) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write(way + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def part_clipping(turns: int) -> list[Row]:
    """Time and memory of clipping, against no privacy and against other libraries."""
    if not MODEL.is_dir():
        print(f"clipping: left out, {MODEL} is not there")
        return []
    import jax

    from fedjax_llm.privacy import Joint, PerFactor, PerLayer

    of = problem(Setting())
    layers = jax.tree.leaves(of.part)[0].shape[0]
    kinds = {"joint": Joint(CLIP), "per-factor": PerFactor(CLIP, CLIP)}
    kinds["per-layer"] = PerLayer.even(CLIP, layers)
    whole = MICROBATCHES[-1]
    work: dict[Any, Callable[[], float]] = {}
    for size in MICROBATCHES:
        work["plain", size] = step(of, size, private=False)
        work["private", size] = step(of, size, private=True)
    for size in (MICROBATCHES[0], whole):
        work["ours", size] = clipped_sum(of, kinds["joint"], "vmap", size)
        work["theirs", size] = their_sum(of, size)
    for name, kind in kinds.items():
        work["ghost", name] = clipped_sum(of, kind, "ghost", whole)
        work["vmap", name] = clipped_sum(of, kind, "vmap", whole)
    long_ranks = problem(Setting(rank=64, batch=64, sequence=16))
    for method in ("ghost", "vmap"):
        work[method, "long"] = clipped_sum(long_ranks, kinds["joint"], method, 64)
    with tempfile.TemporaryDirectory() as folder:
        opacus = Opacus(of, Path(folder)) if OPACUS.is_dir() else None
        if opacus is None:
            print(f"clipping: Opacus left out, {OPACUS} is not there; see make_opacus_env.sh")
        else:
            for way in opacus.head["ways"]:
                work["opacus", way] = functools.partial(opacus.step, way)
        seconds = in_turns(work, turns)
        if opacus is not None:
            opacus.close()
    return [
        *_step_rows(seconds),
        *_memory_rows(),
        *_library_rows(of, seconds, None if opacus is None else opacus.head),
        *_ghost_rows(seconds, list(kinds)),
    ]


def _fastest(seconds: dict[Any, list[float]], kind: str) -> Any:
    names = [name for name in seconds if name[0] == kind]
    return min(names, key=lambda name: statistics.median(seconds[name]))


def _step_rows(seconds: dict[Any, list[float]]) -> list[Row]:
    rows = []
    plain, private = _fastest(seconds, "plain"), _fastest(seconds, "private")
    for name, size in (plain, private):
        median = statistics.median(seconds[name, size])
        rows.append(row(f"clipping: {name} step, micro-batch {size}", median, "s"))
    rows.append(
        row(
            "clipping: private step over plain, each at its best",
            ratio(seconds[private], seconds[plain]),
            "x",
            1.15,
        )
    )
    for size in MICROBATCHES:
        found = ratio(seconds["private", size], seconds["plain", size])
        rows.append(row(f"clipping: private step over plain, micro-batch {size}", found, "x"))
    return rows


def _memory_rows() -> list[Row]:
    names = ("plain", "private", "vmap", "ghost", "vmap-long", "ghost-long")
    bytes_of = {name: _alone("--memory", name) for name in names}
    rows = [
        row(
            "clipping: peak memory of a private step over plain",
            bytes_of["private"] / bytes_of["plain"],
            "x",
            1.3,
        )
    ]
    rows += [
        row(f"clipping: peak memory of a {name} step", bytes_of[name], "bytes")
        for name in ("plain", "private")
    ]
    rows += [
        row(
            f"clipping: peak memory of ghost over vmap, {what}",
            bytes_of[f"ghost{suffix}"] / bytes_of[f"vmap{suffix}"],
            "x",
        )
        for suffix, what in (("", "joint"), ("-long", "rank 64, 64 x 16 tokens"))
    ]
    return rows


def _library_rows(of: Problem, seconds: dict[Any, list[float]], head: Any) -> list[Row]:
    import jax
    import numpy as np

    ours, theirs = _fastest(seconds, "ours"), _fastest(seconds, "theirs")
    rows = [
        row(
            "clipping: speed over jax-privacy, each at its best",
            ratio(seconds[theirs], seconds[ours]),
            "x",
            1.0,
            least=True,
        )
    ]
    for size in (MICROBATCHES[0], MICROBATCHES[-1]):
        found = ratio(seconds["theirs", size], seconds["ours", size])
        rows.append(row(f"clipping: speed over jax-privacy, micro-batch {size}", found, "x"))
    if head is None:
        return rows
    losses = jax.jit(jax.vmap(of.loss, in_axes=(None, None, 0)))(of.base, of.part, of.rows)
    apart = abs(float(np.mean(losses)) - head["loss"])
    rows.append(row("clipping: loss here and in PyTorch, apart", apart, "nats", 1e-3))
    rows += [
        row(f"clipping: PyTorch step, {way}", statistics.median(seconds["opacus", way]), "s")
        for way in head["ways"]
    ]
    private = {name: times for name, times in seconds.items() if name != ("opacus", "plain")}
    fastest = _fastest(private, "opacus")
    at_once = ("private", MICROBATCHES[-1])
    rows.append(
        row(
            f"clipping: speed over Opacus {head['opacus']} ({fastest[1]}), all at once",
            ratio(seconds[fastest], seconds[at_once]),
            "x",
            1.5,
            least=True,
        )
    )
    best = _fastest(seconds, "private")
    rows.append(
        row(
            f"clipping: speed over Opacus, ours in micro-batches of {best[1]}",
            ratio(seconds[fastest], seconds[best]),
            "x",
        )
    )
    overhead = ratio(seconds[fastest], seconds["opacus", "plain"])
    rows.append(row("clipping: Opacus step over plain PyTorch", overhead, "x"))
    return rows


def _ghost_rows(seconds: dict[Any, list[float]], kinds: list[str]) -> list[Row]:
    rows = [
        row(
            f"clipping: time of ghost over vmap, {name}",
            ratio(seconds["ghost", name], seconds["vmap", name]),
            "x",
        )
        for name in kinds
    ]
    found = ratio(seconds["ghost", "long"], seconds["vmap", "long"])
    return [*rows, row("clipping: time of ghost over vmap, rank 64, 64 x 16 tokens", found, "x")]


def memory(name: str) -> float:
    """Bytes by which the peak resident memory grows over three steps, in this process."""
    from fedjax_llm.privacy import Joint

    method, _, suffix = name.partition("-")
    if method in ("plain", "private"):
        work = step(problem(Setting()), MICROBATCHES[-1], private=method == "private")
    else:
        setting = Setting(rank=64, batch=64, sequence=16) if suffix else Setting()
        work = clipped_sum(problem(setting), Joint(CLIP), method, setting.batch)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _status("VmRSS")
    for _ in range(3):
        work()
    return float(_status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not report {field}; the benchmark needs Linux")


def _alone(*arguments: str) -> Any:
    """What this file, started in a process of its own, writes to the file it is given."""
    with tempfile.NamedTemporaryFile(suffix=".json") as found:
        command = [sys.executable, __file__, *arguments, "--json", found.name]
        subprocess.run(command, check=True)
        return json.loads(Path(found.name).read_text())


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "clipping": part_clipping,
    **{
        name: lambda turns, part=part: part()
        for name, part in privacy_checks.everything(SHARED).items()
    },
}


def main() -> None:
    """Parses the command line, runs each part in a process of its own, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="this part only")
    parser.add_argument("--turns", type=int, default=12, help="measured turns")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        arguments.json.write_text(json.dumps(memory(arguments.memory)))
        return
    if arguments.here:
        arguments.json.write_text(json.dumps(PARTS[arguments.here](arguments.turns)))
        return
    rows = []
    for name in [arguments.part] if arguments.part else PARTS:
        own = _alone("--here", name, "--turns", str(arguments.turns))
        show(own)
        rows += own
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
