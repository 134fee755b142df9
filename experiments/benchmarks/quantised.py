"""A quantised base: its bytes, what it costs in loss, and a training step's time.

    command   python experiments/benchmarks/quantised.py [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Loss is that of the model without an adapter, nats a token, over four stories of TinyStories'
validation split, as a difference from float32. A step is the gradient of 8 rows of 128 tokens by an
adapter of rank 8 on all projections; the kinds take turns, and times are medians over the turns,
as ratios to float32.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import Row, row, show, write

from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Batch, Model, base_bytes, load_model, loss, quantised_base

SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TEXT = SHARED / "data" / "lm_text" / "tinystories_valid_4stories.txt"
MODELS = ("stories260K", "stories15M")
KINDS = ("int8", "nf4", "nf4-double")
LENGTH, ROWS = 128, 8


def text_rows(model: Model) -> Batch:
    """The stories in rows of LENGTH tokens."""
    ids = np.array(model.tokenizer.encode(TEXT.read_text("utf-8")), np.int32)
    tokens = jnp.asarray(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))
    return Batch(tokens, jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, jnp.int32))


def step_seconds(model: Model, bases: dict[str, Any], turns: int) -> dict[str, float]:
    """Median seconds of a step by kind; the bases take turns on the same program's arguments."""
    adapter = init_adapter(model.config, LoraConfig(8, 16.0, ("all-linear",)), jax.random.key(0))
    tokens = jax.random.randint(
        jax.random.key(1), (ROWS, LENGTH), 0, model.config.vocab_size, jnp.int32
    )
    batch = Batch(tokens, jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, jnp.int32))

    @jax.jit
    def step(base: Any) -> Any:
        return jax.grad(lambda a: jnp.sum(loss(model.config, base, a, batch)[0]))(adapter)

    seconds: dict[str, list[float]] = {kind: [] for kind in bases}
    for turn in range(turns + 1):
        for kind, base in bases.items():
            spent = timed(lambda base=base: jax.block_until_ready(step(base)))
            if turn:  # the first compiles
                seconds[kind].append(spent)
    return {kind: statistics.median(found) for kind, found in seconds.items()}


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(name: str, turns: int) -> list[Row]:
    """The rows of one model."""
    model = load_model(SHARED / "models" / name)
    bases = {"float32": model.base}
    bases |= {kind: quantised_base(model.base, kind) for kind in KINDS}  # type: ignore[arg-type]
    text = text_rows(model)

    @jax.jit
    def nll(base: Any) -> jax.Array:
        nll_B, tokens_B = loss(model.config, base, None, text)
        return jnp.sum(nll_B) / jnp.sum(tokens_B).astype(jnp.float32)

    plain = float(nll(model.base))
    seconds = step_seconds(model, bases, turns)
    kernels = sum(
        module["kernel"].nbytes for module in model.base["layers"].values() if "kernel" in module
    )
    rest = base_bytes(model.base) - kernels
    rows = [
        row(f"{name}: loss, float32", plain, "nats"),
        row(f"{name}: step, float32", seconds["float32"], "s"),
        row(f"{name}: kernels of the layers, float32", float(kernels), "bytes"),
        row(f"{name}: embeddings and norms, float32", float(rest), "bytes"),
    ]
    for kind in KINDS:
        rows += [
            row(f"{name}: loss lost, {kind}", float(nll(bases[kind])) - plain, "nats"),
            row(f"{name}: step over that of float32, {kind}",
                seconds[kind] / seconds["float32"], ""),
            row(f"{name}: kernels of the layers, {kind}",
                float(base_bytes(bases[kind]) - rest), "bytes"),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Parses the command line, measures both models, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="of each kind")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    rows = [found for name in MODELS for found in measure(name, arguments.turns)]
    show(rows)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
