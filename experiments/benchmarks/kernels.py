"""Each kernel's time beside what the machine allows: its share of the roofline.

    command   python experiments/benchmarks/kernels.py [--quick] [--choices FOLDER] [--json FILE]
    machine, time and result: kernels/README.md

First the machine: bytes a second of a copy that leaves the caches, and operations a second of a
large matrix product, in each dtype used. Then each kernel: the bytes that it must move and the
operations of its matrix products, by formula from its shapes (see the cases), bound its time from
below by the larger of the two quotients. The share of the roofline is that bound over the fastest
of thirty calls, and the machine's figures are the best that were seen between the kernels: the
machine may be shared. A kernel that reads its input twice where once would do thus shows as half;
one whose arrays stay in a cache may show more than all. On a CPU the XLA form is timed, on an
accelerator both, and `--choices` records which was faster (`fedjax_llm_kernels.choice`).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from table import Row, row, show, write

from fedjax_llm.models.attention import attend, causal_sight
from fedjax_llm_kernels.choice import Choices, times
from fedjax_llm_kernels.clip_sum import clip_sum
from fedjax_llm_kernels.cross_entropy import chunked_cross_entropy
from fedjax_llm_kernels.many_adapters import many_adapter_matmul
from fedjax_llm_kernels.quantise_pack import quantise_pack

Implementation = str


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: of the row.
        run: `run(implementation, *arrays)`.
        arrays: makes the arguments.
        bytes: that must be read or written once, with all that is kept on the way in fast memory.
        flops: of the matrix products.
        dtype: of the matrix products, None where there are none.
    """

    name: str
    run: Callable[..., Any]
    arrays: Callable[[], tuple[jax.Array, ...]]
    bytes: float
    flops: float
    dtype: Any


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    """Normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def clip_case(examples: int, size: int) -> Case:
    """Sum of clipped gradients: reads them once, writes one."""

    def run(how: Implementation, x_ExP: jax.Array, counts_E: jax.Array) -> Any:
        return clip_sum([x_ExP], counts_E, 1.0, how)

    def arrays() -> tuple[jax.Array, ...]:
        return normal(examples, size), jnp.ones(examples, bool)

    name = f"clip and sum, {examples} x {size:,}"
    bytes_ = 4.0 * size * (examples + 1)
    return Case(name, run, arrays, bytes_, 0.0, None)


def entropy_case(rows: int, width: int, vocabulary: int, dtype: Any, gradient: bool) -> Case:
    """Cross entropy: 2 N V D operations, twice with the gradient; the weights pass once."""

    def total(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, how: str) -> jax.Array:
        return jnp.sum(chunked_cross_entropy(hidden, unembed, targets, 4096, how))

    def run(how: Implementation, *arrays: jax.Array) -> Any:
        function = jax.value_and_grad(total) if gradient else total
        return function(*arrays, how)

    def arrays() -> tuple[jax.Array, ...]:
        targets = jax.random.randint(jax.random.key(1), (rows,), 0, vocabulary, jnp.int32)
        weights = normal(vocabulary, width, dtype=dtype, seed=2) / width**0.5
        return normal(rows, width, dtype=dtype), weights.astype(dtype), targets

    size = jnp.dtype(dtype).itemsize
    what = "loss and gradient" if gradient else "loss"
    name = f"cross entropy, {what}, {rows} x {width} x {vocabulary:,} {jnp.dtype(dtype).name}"
    bytes_ = size * ((rows + vocabulary) * width + gradient * rows * width) + 8.0 * rows
    flops = (2.0 + 2.0 * gradient) * rows * vocabulary * width
    return Case(name, run, arrays, bytes_, flops, dtype)


def adapters_case(sizes: tuple[int, int, int, int, int], dtype: Any, gradient: bool) -> Case:
    """Products of K adapters: 2 K T R (D + F) operations forward, twice that backward."""
    clients, positions, width, rank, outputs = sizes

    def run(how: Implementation, x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array) -> Any:
        def product(*args: jax.Array) -> jax.Array:
            return many_adapter_matmul(*args, 2.0, how)

        if not gradient:
            return product(x, a, b)
        y, pull = jax.vjp(product, x, a, b)
        return y, pull(dy)

    def arrays() -> tuple[jax.Array, ...]:
        return (
            normal(clients, positions, width, dtype=dtype),
            normal(clients, width, rank, dtype=dtype),
            normal(clients, rank, outputs, dtype=dtype),
            normal(clients, positions, outputs, dtype=dtype),
        )

    size = jnp.dtype(dtype).itemsize
    outer = clients * positions
    adapters = clients * rank * (width + outputs)
    moved = outer * (width + outputs) + adapters
    if gradient:
        moved += outer * (2 * width + outputs) + 2 * adapters
    # Backward needs u, dx, da and db; x @ a is counted once, whether it is kept or made again.
    flops = (2.0 + 4.0 * gradient) * outer * rank * (width + outputs)
    what = "forward, backward" if gradient else "forward"
    shape = f"{clients} x {positions} x {width} -> {rank} -> {outputs}"
    name = f"adapters, {what}, {shape} {jnp.dtype(dtype).name}"
    return Case(name, run, arrays, float(size * moved), flops, dtype)


def attention_case(sizes: tuple[int, int, int, int, int], dtype: Any, gradient: bool) -> Case:
    """Causal attention: two products over the keys that a query sees; four more backward."""
    rows, length, heads, groups, width = sizes

    def run(how: Implementation, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        def mixed(*qkv: jax.Array) -> jax.Array:
            sight = causal_sight(
                (rows, length), None, None, width=width, dtype=dtype, implementation=how
            )
            return attend(*qkv, sight)

        if not gradient:
            return mixed(q, k, v)
        out, pull = jax.vjp(mixed, q, k, v)
        return out, pull(dout)

    def arrays() -> tuple[jax.Array, ...]:
        counts = heads, groups, groups, heads
        return tuple(
            normal(rows, length, count, width, dtype=dtype, seed=place)
            for place, count in enumerate(counts)
        )

    # Forward q, k, v and the mix; backward those, the mix's cotangent and three cotangents.
    moved = (2 + 4 * gradient) * (heads + groups)
    what = "forward, backward" if gradient else "forward"
    name = f"attention, {what}, {rows} x {length} x {heads}/{groups} x {width} "
    return Case(
        name + jnp.dtype(dtype).name,
        run,
        arrays,
        float(jnp.dtype(dtype).itemsize * rows * length * width * moved),
        (2.0 + 4.0 * gradient) * rows * heads * width * length * (length + 1),
        dtype,
    )


def pack_case(count: int, bits: int) -> Case:
    """Quantise and pack: 8 bytes a number in, b bits out."""

    def run(how: Implementation, y: jax.Array, random: jax.Array) -> Any:
        return quantise_pack(y, random, 0.1, bits, how)

    def arrays() -> tuple[jax.Array, ...]:
        return normal(count), jax.random.bits(jax.random.key(1), (count,), jnp.uint32)

    name = f"quantise and pack, {count:,} to {bits} bits"
    return Case(name, run, arrays, count * (8 + bits / 8), 0.0, None)


def cases(quick: bool, cpu: bool) -> list[Case]:
    """Of SmolLM2-135M on a CPU, of an 8-billion-parameter model on an accelerator.

    On a CPU calls are kept to milliseconds: a shared machine interrupts what takes longer, and the
    fastest call would show its load.
    """
    dtypes = [jnp.float32] if cpu else [jnp.float32, jnp.bfloat16]
    if quick:
        entropy, adapters, attention = (64, 64, 1024), (2, 64, 64, 4, 96), (2, 64, 4, 2, 16)
        clips, packs = [(4, 4096)], [1 << 14]
    elif cpu:
        entropy, adapters, attention = (64, 576, 8192), (8, 64, 576, 8, 1536), (4, 128, 9, 3, 64)
        clips, packs = [(8, 1 << 20)], [1 << 22]
    else:
        entropy, adapters = (4096, 4096, 128_256), (16, 2048, 4096, 16, 4096)
        attention = (16, 1024, 32, 8, 64)
        clips, packs = [(64, 3 << 18), (64, 5_000_000)], [1 << 26]
    found = [clip_case(*sizes) for sizes in clips]
    for dtype in dtypes:
        for gradient in (False, True):
            found.append(entropy_case(*entropy, dtype, gradient))
            found.append(adapters_case(adapters, dtype, gradient))
            found.append(attention_case(attention, dtype, gradient))
    return [*found, *(pack_case(count, bits) for count in packs for bits in (4, 8))]


def fastest(run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int = 30) -> float:
    """Seconds of the fastest call: a roofline is about what can be reached, undisturbed."""
    return min(times(run, arguments, repeats))


def peak_bandwidth(quick: bool, cpu: bool) -> float:
    """Bytes a second of x + 1 in place, read and write, over an array that no cache holds."""
    count = 1 << 16 if quick else 1 << 25 if cpu else 1 << 29
    # In place: the operating system would otherwise hand out new pages, which takes longer.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(jnp.zeros(count)))
    took = []
    for _ in range(30):
        started = time.perf_counter()
        x = jax.block_until_ready(step(x))
        took.append(time.perf_counter() - started)
    return 8.0 * count / min(took)


def peak_flops(quick: bool, cpu: bool, dtype: Any) -> float:
    """Operations a second of a square matrix product."""
    side = 256 if quick else 768 if cpu else 8192
    one, other = normal(side, side, dtype=dtype), normal(side, side, dtype=dtype, seed=1)
    return 2.0 * side**3 / fastest(jax.jit(jnp.matmul), (one, other))


class Machine:
    """The best that this machine was seen to do, which on a shared one takes several looks."""

    def __init__(self, quick: bool, cpu: bool) -> None:
        """Looks for the first time."""
        self._quick, self._cpu = quick, cpu
        self.bandwidth = 0.0
        self.flops = {
            jnp.dtype(kind): 0.0 for kind in ([jnp.float32] if cpu else [jnp.float32, jnp.bfloat16])
        }
        self.look()

    def look(self) -> None:
        """Measures again and keeps what is better."""
        self.bandwidth = max(self.bandwidth, peak_bandwidth(self._quick, self._cpu))
        for dtype, best in self.flops.items():
            self.flops[dtype] = max(best, peak_flops(self._quick, self._cpu, dtype))

    def bound(self, case: Case) -> float:
        """Seconds that a case takes at least."""
        moving = case.bytes / self.bandwidth
        if case.dtype is None:
            return moving
        return max(moving, case.flops / self.flops[jnp.dtype(case.dtype)])

    def rows(self) -> list[Row]:
        """What was measured."""
        products = [
            row(f"machine: matrix product, {dtype.name}", rate / 1e9, "GFLOP/s")
            for dtype, rate in self.flops.items()
        ]
        return [row("machine: copy", self.bandwidth / 1e9, "GB/s"), *products]


def measure(quick: bool, choices: Path | None) -> list[Row]:
    """All rows."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    print(f"{device.device_kind}, JAX {jax.__version__}, {jax.default_backend()}", flush=True)
    machine = Machine(quick, cpu)
    remembered = Choices(choices) if choices is not None else None
    timed = []
    for case in cases(quick, cpu):
        arrays = case.arrays()
        for how in ["xla"] if cpu else ["xla", "pallas"]:
            try:
                timed.append((case, how, fastest(jax.jit(partial(case.run, how)), arrays)))
            except Exception as error:
                # Whatever the compiler of a device that was never tried raises: others are timed.
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{case.name}: {how}: not measured: {reason}", flush=True)
        if remembered is not None and not cpu:
            forms = {how: partial(case.run, how) for how in ("xla", "pallas")}
            print(f"{case.name}: {remembered.pick(case.name, forms, *arrays)}", flush=True)
        machine.look()
    rows = machine.rows()
    for case, how, took in timed:
        rows.append(row(f"{case.name}: {how}", took * 1e3, "ms"))
        share = 100 * machine.bound(case) / took
        rows.append(row(f"{case.name}: {how}, of the roofline", share, "%"))
    show(rows)
    return rows


def main() -> None:
    """Reads the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--choices", type=Path, help="folder for the faster form of each kernel")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write(measure(arguments.quick, arguments.choices), arguments.json)


if __name__ == "__main__":
    main()
