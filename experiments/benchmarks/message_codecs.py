"""Codecs: what they cost, and what they lose of real LoRA updates at equal bytes.

    command   python experiments/benchmarks/message_codecs.py [--part NAME] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

(JAX looks for a module called `compression` on the path, which is why this one is not.)

- speed: compiled encode and decode (both stages) of one message of a million float32 parameters, 32
  layers of rank-8 factors 2048 wide, on the devices that JAX finds; rounding; packing, by numpy on
  one core. Medians.
- bits: the mean of eight clients' real updates (lora_updates.py) rounded at random to 16, 8 and 4
  bits, with and without rotation. The step follows from the longest client's norm as clip norm, and
  from `least_error_bound`, or `coordinate_bound` at a tail of 1e-6. Relative l2 error, root mean
  square over rounds.
- share: the same updates at a tenth and a thirtieth of the numbers. "One round": the error of one
  round's mean, without memory, root mean square over rounds. "With memory": the error of the sum of
  all that has arrived against the sum of all updates, after all rounds. A count sketch, which is no
  codec here, stands beside them at the best of several numbers of heavy hitters; and the largest
  numbers of the mean itself, which no sum of messages could know, as a limit.
- both: some of them rounded to 4 bits after a rotation, cut for the least error, with memory; what
  rounding and cuts take goes into the memory, too.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lora_updates
import numpy as np
from table import Row, row, show, write

from fedjax_llm.compression import (
    Chain,
    Codec,
    Fragment,
    Identity,
    PowerSgd,
    RandomMask,
    Rotated,
    Sketch,
    TopMask,
    TurnMask,
    count,
    feedback,
    largest_integer,
    pack,
    payload_bytes,
    quantise,
    quantise_within,
    unpack,
)

MILLION = 1e6
TAIL = 1e-6
BITS = (16, 8, 4)


# Speed.


def part_speed(repeats: int) -> list[Row]:
    """Milliseconds per million parameters."""
    shapes = {"a": (32, 2048, 8), "b": (32, 8, 2048)}
    draw = np.random.default_rng(0)
    tree = {
        side: jnp.asarray(draw.normal(size=shape), jnp.float32) for side, shape in shapes.items()
    }
    key, size = jax.random.key(1), count(tree)
    codecs: list[Codec] = [
        Identity(),
        Rotated(),
        RandomMask(10),
        TurnMask(10),
        TopMask(10),
        Sketch(10),
        PowerSgd(1),
        Fragment(4),
        Chain((TurnMask(10), Rotated())),
    ]
    rows = []
    for codec in codecs:
        name = _named(codec)
        state = codec.init(tree)
        shared: Any = ()
        if codec.stages > 1:
            shared = jax.jit(codec.between)(tree, state, key, codec.encode(state, key, tree))

        def encode(state: Any, tree: Any, shared: Any, codec: Codec = codec) -> Any:
            stages = range(codec.stages)
            return [codec.encode(state, key, tree, s, shared if s else ()) for s in stages]

        def decode(state: Any, mean: Any, shared: Any, codec: Codec = codec) -> Any:
            return codec.decode(tree, state, key, mean, shared)

        def advance(state: Any, mean: Any, shared: Any, codec: Codec = codec) -> Any:
            return codec.advance(tree, state, key, mean, shared)

        sent = jax.jit(encode)(state, tree, shared)[-1]
        for what, work, data in (
            ("encode", encode, tree),
            ("decode", decode, sent),
            ("next state", advance, sent),
        ):
            if what != "next state" or codec.facts.keeps:
                seconds = _seconds(jax.jit(work), repeats, state, data, shared)
                rows.append(row(f"speed, {name}: {what}", seconds / size * MILLION * 1e3, "ms"))
    y = jnp.concatenate([jnp.ravel(leaf) for leaf in tree.values()])
    for name, rounding in (
        ("rounding to 8 bits", lambda y: quantise(key, y, 0.05, 127)),
        ("conditional rounding", lambda y: quantise_within(key, y, 0.05, 127, 1e9)),
    ):
        seconds = _seconds(jax.jit(rounding), repeats, y)
        rows.append(row(f"speed, {name}", seconds / size * MILLION * 1e3, "ms"))
    for bits in BITS:
        largest = largest_integer(bits)
        ints = draw.integers(-largest, largest + 1, size, np.int32)
        payload = pack(ints, bits)
        assert len(payload) == payload_bytes(size, bits)
        for what, work in (
            ("pack", lambda ints=ints, bits=bits: pack(ints, bits)),
            ("unpack", lambda payload=payload, bits=bits: unpack(payload, size, bits)),
        ):
            seconds = _seconds(work, repeats)
            rows.append(row(f"speed, {what} {bits} bits", seconds / size * MILLION * 1e3, "ms"))
    return rows


def _seconds(work: Callable[..., Any], repeats: int, *arguments: Any) -> float:
    """Median, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(work(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _named(codec: Codec) -> str:
    if isinstance(codec, Chain):
        return ", ".join(map(_named, codec.codecs))
    settings = [str(value) for value in vars(codec).values() if value is not False]
    return " ".join([codec.name, *settings[:1]])


# What is lost.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _round(
    codec: Codec,
    bits: int | None,
    least: bool,
    state: Any,
    key: jax.Array,
    trees_K: Any,
    memory_K: Any,
) -> tuple[Any, Any, Any]:
    """The mean as it arrives, the clients' memories, and the next state."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jnp.float32), trees_K)
    trees_K = feedback.corrected(memory_K, trees_K)
    shared: Any = ()
    for stage in range(codec.stages):

        def one(tree: Any, stage: int = stage, shared: Any = shared) -> Any:
            return codec.encode(state, key, tree, stage, shared)

        sent_K = jax.vmap(one)(trees_K)
        if bits is not None:
            clients = jax.tree.leaves(sent_K)[0].shape[0]
            reach = codec.coordinate_bound(like, 1.0, TAIL, stage)
            if least:
                reach = codec.least_error_bound(like, 1.0, bits, clients, stage)
            sent_K = _rounded(jax.random.fold_in(key, 99 + stage), sent_K, reach, bits)
        mean = jax.tree.map(lambda leaf_K: jnp.mean(leaf_K, axis=0), sent_K)
        if stage + 1 < codec.stages:
            shared = codec.between(like, state, key, mean)

    def remember(memory: Any, tree: Any, sent: Any) -> Any:
        return feedback.remember(codec, state, key, memory, tree, shared, sent)

    return (
        codec.decode(like, state, key, mean, shared),
        jax.vmap(remember)(memory_K, trees_K, sent_K),
        codec.advance(like, state, key, mean, shared),
    )


def _rounded(key: jax.Array, sent_K: Any, reach: float, bits: int) -> Any:
    """Encodings rounded with one step, so that the longest of them just fits; back in float32."""
    leaves, structure = jax.tree.flatten(sent_K)
    clients = leaves[0].shape[0]
    y_KxM = jnp.concatenate([leaf.reshape(clients, -1) for leaf in leaves], axis=1)
    norm = jnp.max(jnp.sqrt(jnp.sum(jnp.square(y_KxM), axis=1)))
    largest = largest_integer(bits)
    step = norm * jnp.float32(reach / largest)
    keys_K = jax.random.split(key, clients)
    ints_KxM = jax.vmap(lambda own, y_M: quantise(own, y_M, step, largest))(keys_K, y_KxM)
    y_KxM = ints_KxM.astype(jnp.float32) * step
    ends = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
    pieces = jnp.split(y_KxM, ends, axis=1)
    shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def _means(updates: Sequence[Any]) -> list[np.ndarray]:
    return [
        _flat(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).mean(0), each))
        for each in updates
    ]


def lost(
    codec: Codec,
    updates: Sequence[Any],
    bits: int | None = None,
    memory: bool = False,
    least: bool = True,
) -> float:
    """The relative error of what arrives: of each round without memory, of the sum with it."""
    like = jax.tree.map(lambda leaf: leaf[0], updates[0])
    state, empty_K = codec.init(like), jax.tree.map(jnp.zeros_like, updates[0])
    memory_K, arrived = empty_K, []
    for number, trees_K in enumerate(updates):
        key = jax.random.fold_in(jax.random.key(7), number)
        decoded, memory_K, state = _round(codec, bits, least, state, key, trees_K, memory_K)
        memory_K = memory_K if memory else empty_K
        arrived.append(_flat(decoded))
    wanted = _means(updates)
    if memory:
        total = sum(wanted)
        return float(np.linalg.norm(sum(arrived) - total) / np.linalg.norm(total))
    each = [
        np.sum(np.square(x - y)) / np.sum(np.square(y))
        for x, y in zip(arrived, wanted, strict=True)
    ]
    return float(np.sqrt(np.mean(each)))


def share(codec: Codec, updates: Sequence[Any]) -> float:
    """Numbers sent in all stages, of those of a message."""
    like = jax.tree.map(lambda leaf: leaf[0], updates[0])
    return sum(codec.size(like, stage) for stage in range(codec.stages)) / count(like)


def part_bits(updates: Sequence[Any]) -> list[Row]:
    """Rounding alone."""
    rows = []
    for bits in BITS:
        for what, codec, least in (
            ("rotated, cut for the least error", Rotated(), True),
            ("rotated, next to never cut", Rotated(), False),
            ("not rotated", Identity(), False),
        ):
            error = lost(codec, updates, bits, least=least)
            rows.append(row(f"bits, {bits}, {what}: error of the mean of 8", error, ""))
    return rows


def part_share(updates: Sequence[Any]) -> list[Row]:
    """A tenth and a thirtieth of the numbers."""
    rows = []
    for one_in in (10, 30):
        codecs: list[Codec] = [
            RandomMask(one_in),
            TurnMask(one_in),
            TopMask(one_in),
            Sketch(one_in),
            Chain((Fragment(5), RandomMask(one_in // 5))),
            PowerSgd(1) if one_in == 10 else Chain((PowerSgd(1), RandomMask(one_in // 7))),
        ]
        for codec in codecs:
            name = f"share, {_named(codec)}, 1/{1 / share(codec, updates):.1f} of the numbers"
            rows.append(row(f"{name}: one round", lost(codec, updates), ""))
            rows.append(row(f"{name}: with memory", lost(codec, updates, memory=True), ""))
        kept = -(-count(updates[0]) // lora_updates.CLIENTS // one_in)
        sketched = [_count_sketch(mean, kept) for mean in _means(updates)]
        rows.append(row(f"share, count sketch, 1/{one_in}: one round", _rms(sketched), ""))
        limits = [_largest(mean, kept) for mean in _means(updates)]
        rows.append(row(f"share, largest of the mean, 1/{one_in}: one round", _rms(limits), ""))
    return rows


def part_both(updates: Sequence[Any]) -> list[Row]:
    """Fewer numbers of four bits."""
    rows = []
    for codecs in (
        (Rotated(),),
        (Fragment(5), Rotated()),
        (PowerSgd(1), Rotated()),
        (TurnMask(10), Rotated()),
        (TurnMask(30), Rotated()),
    ):
        codec = Chain(codecs)
        fraction = 32 / 4 / share(codec, updates)
        name = f"both, {_named(codec)}, 4 bits, 1/{fraction:.0f} of the bytes: with memory"
        rows.append(row(name, lost(codec, updates, bits=4, memory=True), ""))
    return rows


def _count_sketch(x_P: np.ndarray, numbers: int, tables: int = 5) -> float:
    """Relative error of a count sketch (arXiv 2007.07682): medians of five tables, the best cut."""
    draw = np.random.default_rng(0)
    width = numbers // tables
    estimates = []
    for _ in range(tables):
        bucket_P = draw.integers(0, width, x_P.size)
        sign_P = draw.choice([-1.0, 1.0], x_P.size)
        table = np.bincount(bucket_P, weights=sign_P * x_P, minlength=width)
        estimates.append(sign_P * table[bucket_P])
    median_P = np.median(estimates, axis=0)
    order_P = np.argsort(-np.abs(median_P))
    errors = []
    for part in (0.001, 0.003, 0.01, 0.03, 0.1):
        found_P = np.zeros_like(x_P)
        heavy = order_P[: max(1, int(part * x_P.size))]
        found_P[heavy] = median_P[heavy]
        errors.append(np.linalg.norm(found_P - x_P) / np.linalg.norm(x_P))
    return float(min(errors))


def _largest(x_P: np.ndarray, numbers: int) -> float:
    """Relative error of keeping the largest numbers."""
    squares_P = np.sort(np.square(x_P))
    return float(np.sqrt(squares_P[:-numbers].sum() / squares_P.sum()))


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["speed", "bits", "share", "both"], help="this part only")
    parser.add_argument("--rounds", type=int, default=30, help="of real training")
    parser.add_argument("--repeats", type=int, default=9, help="of each timing")
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args()
    rows = part_speed(given.repeats) if given.part in (None, "speed") else []
    parts = {"bits": part_bits, "share": part_share, "both": part_both}
    wanted = [name for name in parts if given.part in (None, name)]
    if wanted and not lora_updates.available():
        print(f"real updates: left out, {lora_updates.MODEL} is not there", file=sys.stderr)
    elif wanted:
        updates = lora_updates.updates(given.rounds)
        for name in wanted:
            rows += parts[name](updates)
    show(rows)
    write(rows, given.json)


if __name__ == "__main__":
    main()
