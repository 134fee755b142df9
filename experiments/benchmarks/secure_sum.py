"""The encrypted sum: what a client and the server pay for it, and that it is exact.

    command   python experiments/benchmarks/secure_sum.py [--quick] [--json FILE]
    machine, time and result: experiments/benchmarks/README.md

Each part runs in a process of its own. Costs are measured on one core (the process is pinned
before JAX starts): medians, per million parameters, of 16-bit values summed over up to 8 clients.
TenSEAL, with the parameters of NVFlare's homomorphic aggregation, is measured next to us in the
same process where it is installed (``pip install '.[bench]'``). Where JAX has an accelerator, the
costs are measured there as well.
"""

import argparse
import json
import math
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from table import Row, row, show, write

MILLION = 1_000_000
BITS, CLIENTS = 16, 8
CLOUDS, THRESHOLD = ("medical", "finance", "general"), 2


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median over ``repeats`` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes() -> int:
    """Largest resident size of this program so far; getrusage would count its parent's as well."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [each for each in status.read_text().splitlines() if each.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_sum(count: int, clients: int = CLIENTS, bits: int = BITS) -> Any:
    from fedjax_llm.secure import ThresholdSum

    return ThresholdSum(CLOUDS, THRESHOLD, count, 2 ** (bits - 1) - 1, clients)


def part_costs(repeats: int, device: str) -> list[Row]:
    """One client and the server, and TenSEAL beside them."""
    import jax.numpy as jnp
    import numpy as np

    from fedjax_llm.secure import FixedPoint

    count = MILLION
    rng = np.random.default_rng(0)
    codec = FixedPoint(bits=BITS, bound=1.0, summands=CLIENTS)
    floats = jnp.asarray(rng.uniform(-1, 1, count).astype(np.float32))
    secure_sum = open_sum(count)
    encode = _jitted(codec.encode)

    def client() -> tuple[float, float]:
        """Seconds for the key chunk, and for everything else."""
        start = time.perf_counter()
        upload = secure_sum.upload("client", 0, encode(floats))
        before_key = time.perf_counter()
        next(upload)
        after_key = time.perf_counter()
        for _ in upload:
            pass
        return after_key - before_key, time.perf_counter() - start - (after_key - before_key)

    client()
    timed = [client() for _ in range(repeats)]
    key_seconds = statistics.median(key for key, _ in timed)
    bulk_seconds = statistics.median(bulk for _, bulk in timed)

    # Two lengths: their difference is what parameters cost, the rest is what a client costs.
    longer = 9
    adding, verifying, sizes = {}, {}, {}
    for millions in (1, longer):
        size = millions * count
        sums = secure_sum if millions == 1 else open_sum(size)
        ints = rng.integers(-(2**15) + 1, 2**15, size, dtype=np.int32)
        added, verified = [], []
        for number in range(repeats):
            server = sums.begin(number + 1)
            server.add("first", sums.upload("first", number + 1, ints))
            chunks, others = (list(sums.upload(name, number + 1, ints)) for name in ("a", "b"))
            start = time.perf_counter()
            server.add("a", chunks)
            _wait(server)
            added.append(time.perf_counter() - start)
            start = time.perf_counter()
            with server._intake.receive("b", others):
                verified.append(time.perf_counter() - start)
        adding[millions] = statistics.median(added)
        verifying[millions] = statistics.median(verified)
        sizes[millions] = sum(map(len, chunks))
        key_bytes = len(chunks[0])
    short_bytes, long_bytes = sizes[1], sizes[longer]
    both_seconds = (adding[longer] - adding[1]) / (longer - 1)
    verify_seconds = (verifying[longer] - verifying[1]) / (longer - 1)
    fixed_server = adding[1] - both_seconds

    unmasking, wrong = [], 0
    for number in range(repeats):
        vectors = rng.integers(-(2**15) + 1, 2**15, (CLIENTS, count), dtype=np.int32)
        server = secure_sum.begin(100 + number)
        for k in range(CLIENTS if number == 0 else 2):
            server.add(f"c{k}", secure_sum.upload(f"c{k}", 100 + number, vectors[k]))
        total = np.concatenate(list(server.pieces(CLOUDS)))
        summed = vectors[: CLIENTS if number == 0 else 2].sum(axis=0, dtype=np.int64)
        wrong += int(np.count_nonzero(total != summed))
        unmasking.append(server.costs.seconds["unmask"])
        decrypting = server.costs.seconds["decrypt"]
    unmask_seconds = statistics.median(unmasking)

    at = f" [{device}]"
    ring = secure_sum.parameters.ring
    rows = [
        row(f"client: encode, encrypt, serialise, per million{at}", bulk_seconds * 1e3, "ms", 12),
        row(
            "uplink per parameter, long message", (long_bytes - key_bytes) / longer / count, "B", 3
        ),
        row("uplink per parameter, 1 million, keys included", short_bytes / count, "B", 3),
        row("payload of a 16-bit sum over 8 clients", math.log2(2 * 8 * 32767 + 1) / 8, "B"),
        row(
            f"server: add one client, per million{at}",
            (both_seconds - verify_seconds) * 1e3,
            "ms",
            1.2,
        ),
        row(f"server: verify one client's MACs, per million{at}", verify_seconds * 1e3, "ms"),
        row(f"server: verify and add one client, per million{at}", both_seconds * 1e3, "ms", 1.2),
        row(f"unmask, per million{at}", unmask_seconds * 1e3, "ms", 10),
        row("OpenFHE per client and round: client's side", key_seconds * 1e3, "ms"),
        row("OpenFHE per client and round: server's side", fixed_server * 1e3, "ms"),
        row(
            "OpenFHE per client and round: both sides",
            (key_seconds + fixed_server) * 1e3,
            "ms",
            20,
        ),
        row("OpenFHE per client and round: bytes", key_bytes / 1e3, "kB", 400),
        row("OpenFHE per round: decryption by the clouds", decrypting * 1e3, "ms"),
        row(f"wrong integers of {repeats} sums of a million", wrong, "", 0),
        row(
            f"ring: N = {ring.size}, {ring.limbs} limbs, {ring.digits} integers per coefficient; "
            "log2 of the failure probability",
            secure_sum.parameters.failure_log2(count),
            "",
            -40,
        ),
    ]
    if device == "cpu":
        rows += _tenseal(np.asarray(floats), bulk_seconds)
    return rows


def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    return jax.jit(function)


def _wait(server: Any) -> None:
    import jax

    jax.block_until_ready(server._totals)


def _tenseal(floats: Any, ours: float) -> list[Row]:
    """NVFlare's parameters: CKKS, N = 8192, moduli of 60, 40, 40 and 60 bits, scale 2^40."""
    name = "TenSEAL: encode, encrypt, serialise, per million"
    try:
        import tenseal
    except ImportError:
        print(f"{name}: not installed here (pip install '.[bench]')", file=sys.stderr)
        return []
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40, 60],
        n_threads=1,
    )
    context.global_scale = 2**40
    slots = 4096
    rows_of_slots = [floats[at : at + slots] for at in range(0, floats.size, slots)]
    sizes: list[int] = []

    def encrypt() -> None:
        sizes[:] = [len(tenseal.ckks_vector(context, part).serialize()) for part in rows_of_slots]

    seconds = median_seconds(encrypt, 3)
    return [
        row(name, seconds * 1e3, "ms"),
        row("TenSEAL: bytes per parameter", sum(sizes) / floats.size, "B"),
        row("times faster than TenSEAL, client", seconds / ours, "x", 100, least=True),
    ]


def part_modes(repeats: int) -> list[Row]:
    """All five modes side by side, all on one core."""
    import numpy as np

    from fedjax_llm.secure import BfvSum, CkksSum, MaskedSum, PlainSum, collect

    count, clients = 250_000, [f"client {k}" for k in range(3)]
    bound, rng = 2 ** (BITS - 1) - 1, np.random.default_rng(1)
    shape = (count, bound, len(clients))
    sums = {
        "plain": PlainSum(*shape),
        "masked": MaskedSum(clients, *shape),
        "threshold": open_sum(count, len(clients)),
        "bfv": BfvSum(CLOUDS, THRESHOLD, *shape, threads=1),
        "ckks": CkksSum(CLOUDS, THRESHOLD, *shape, threads=1),
    }
    vectors = rng.integers(-bound, bound + 1, (len(clients), count), dtype=np.int64)
    rows, wrong = [], 0
    for kind, secure_sum in sums.items():
        encrypting, adding, opening = [], [], []
        for number in range(1 + (repeats if kind in ("plain", "masked", "threshold") else 1)):
            server = secure_sum.begin(number)
            for name, ints in zip(clients, vectors, strict=True):
                start = time.perf_counter()
                chunks = list(secure_sum.upload(name, number, ints))
                sent = time.perf_counter()
                server.add(name, chunks)
                adding.append(time.perf_counter() - sent)
                encrypting.append(sent - start)
            start = time.perf_counter()
            result = collect(server, clients if kind == "masked" else CLOUDS)
            opening.append(time.perf_counter() - start)
            wrong += int(np.count_nonzero(result.total_P != vectors.sum(axis=0)))
        scale = 1e3 * MILLION / count
        size = sum(map(len, chunks)) / count
        rows += [
            row(f"{kind}: uplink per parameter (250,000 of them)", size, "B"),
            row(f"{kind}: client, per million", statistics.median(encrypting) * scale, "ms"),
            row(f"{kind}: add, per million", statistics.median(adding) * scale, "ms"),
            row(f"{kind}: open the sum, per million", statistics.median(opening) * scale, "ms"),
        ]
    rows.append(row("wrong integers, all modes", wrong, "", 0))
    return rows


def part_server(folder: Path, count: int, clients: int) -> list[Row]:
    """The server of a long sum: reads uploads from pipes, writes the total to a file."""
    import numpy as np

    from fedjax_llm.secure import ThresholdSum
    from fedjax_llm.secure.channels import ServerChannels, new_run
    from fedjax_llm.secure.identity import Identity, Roster

    names = [f"client {k}" for k in range(clients)]
    identities = {name: Identity.generate(name) for name in names}
    server_identity = Identity.generate("server")
    roster = Roster([i.public for i in identities.values()])
    channels = ServerChannels(server_identity, roster, new_run())
    secure_sum = ThresholdSum(
        CLOUDS, THRESHOLD, count, 2 ** (BITS - 1) - 1, CLIENTS, channels=channels
    )
    public = folder / "public.npz"
    key = secure_sum.client.key
    np.savez(
        public,
        residues=key.residues_2LN,
        digest=np.frombuffer(key.digest, np.uint8),
        seed=np.frombuffer(key.seed, np.uint8),
    )
    server = secure_sum.begin(1)
    base = peak_bytes()
    largest_client = 0
    for number, name in enumerate(names):
        channel = folder / f"channel{number}"
        channel.write_bytes(channels.key(name))
        command = [sys.executable, __file__, "--part", "client", "--folder", str(folder)]
        command += ["--count", str(count), "--number", str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            server.add(name, _read_frames(process.stdout))
            (client_peak,) = struct.unpack("<Q", process.stdout.read(8))
        if process.returncode:
            raise SystemExit(f"{name} ended with {process.returncode}")
        largest_client = max(largest_client, client_peak)
    with (folder / "total").open("wb") as file:
        for piece in server.pieces(CLOUDS):
            file.write(piece.astype("<i4").tobytes())
    peak = peak_bytes()
    wrong = _compare(folder, count, clients)
    millions = count / MILLION
    return [
        row(f"server process: peak memory, {millions:.0f} million", peak / 1e9, "GB", 1.2),
        row("server process: before the first upload", base / 1e9, "GB"),
        row(
            f"client process: peak memory, {millions:.0f} million", largest_client / 1e9, "GB", 0.6
        ),
        row(f"wrong integers of {millions:.0f} million, {clients} processes", wrong, "", 0),
    ]


def _client_piece(number: int, at: int, size: int) -> Any:
    """The client's values from position ``at`` on; its own, and the same at every call."""
    import numpy as np

    return np.random.default_rng([number, at]).integers(-(2**15) + 1, 2**15, size, dtype=np.int32)


def _pieces(number: int, count: int) -> Iterator[Any]:
    for at in range(0, count, MILLION):
        yield _client_piece(number, at, min(MILLION, count - at))


def _compare(folder: Path, count: int, clients: int) -> int:
    import numpy as np

    wrong = 0
    with (folder / "total").open("rb") as file:
        for at in range(0, count, MILLION):
            size = min(MILLION, count - at)
            found = np.frombuffer(file.read(4 * size), "<i4")
            expected = sum(_client_piece(number, at, size) for number in range(clients))
            wrong += int(np.count_nonzero(found != expected))
    return wrong


def _read_frames(stream: BinaryIO) -> Iterator[bytes]:
    while size := struct.unpack("<Q", stream.read(8))[0]:
        yield stream.read(size)


def part_client(folder: Path, count: int, number: int) -> None:
    """A client of a long sum: makes its values piece by piece and writes chunks to its output."""
    import numpy as np

    from fedjax_llm.secure.joint_key import JointKey
    from fedjax_llm.secure.key_layer import KeyLayer
    from fedjax_llm.secure.ring_message import RingClient, RingLayout
    from fedjax_llm.secure.ring_table import choose

    parameters = choose(2 ** (BITS - 1) - 1, CLIENTS, count)
    with np.load(folder / "public.npz") as public:
        key = JointKey(public["residues"], public["digest"].tobytes(), public["seed"].tobytes())
    layer = KeyLayer.open(parameters, len(CLOUDS))
    client = RingClient(RingLayout(parameters, count), layer, key)
    channel_key = (folder / f"channel{number}").read_bytes()
    out = sys.stdout.buffer
    for chunk in client.upload(f"client {number}", channel_key, 1, _pieces(number, count)):
        out.write(struct.pack("<Q", len(chunk)))
        out.write(chunk)
    out.write(struct.pack("<QQ", 0, peak_bytes()))


def print_table() -> None:
    """The parameter sets that ``ring_table.choose`` gives for a million parameters."""
    from fedjax_llm.secure.ring_table import choose

    print(
        "| bits, clients | N | limbs: bits of q | k | beta | delta | B/parameter | log2 failure |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for bits in (8, 16, 24):
        for clients in (2, 8, 64):
            found = choose(2 ** (bits - 1) - 1, clients, MILLION)
            ring = found.ring
            cells = (
                f"{bits}, {clients}",
                ring.size,
                f"{ring.limbs}: {math.log2(ring.modulus):.1f}",
                ring.digits,
                ring.digit_bits,
                ring.scale_bits,
                f"{found.bits_per_integer / 8:.2f}",
                f"{found.failure_log2(MILLION):.0f}",
            )
            print("| " + " | ".join(map(str, cells)) + " |")


def in_process(part: str, *arguments: str, pinned: bool = False, cpu: bool = True) -> list[Row]:
    """Runs one part in a fresh process and returns its rows."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--part", part, "--json", str(out), "--folder", folder]
        subprocess.run(
            [*command, *arguments],
            check=True,
            env=environment,
            # Before JAX starts and counts the cores.
            preexec_fn=(lambda: os.sched_setaffinity(0, {core})) if pinned else None,
        )
        rows: list[Row] = json.loads(out.read_text())
    return rows


def accelerator() -> str | None:
    """The platform of JAX's first device if it is not a CPU."""
    code = "import jax; print(jax.devices()[0].platform)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    platform = found.stdout.strip()
    return platform if platform not in ("", "cpu") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, 10 million instead of 100"
    )
    parser.add_argument("--part", choices=["costs", "modes", "server", "client", "table"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--count", type=int, default=100 * MILLION)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.part == "client":
        part_client(given.folder, given.count, given.number)
        return
    if given.part == "table":
        print_table()
        return
    if given.part:
        parts = {
            "costs": lambda: part_costs(given.repeats, given.device),
            "modes": lambda: part_modes(given.repeats),
            "server": lambda: part_server(given.folder, given.count, 3),
        }
        rows = parts[given.part]()
    else:
        repeats = ["--repeats", "5" if given.quick else "31"]
        count = ["--count", str((10 if given.quick else 100) * MILLION)]
        rows = in_process("costs", *repeats, pinned=True)
        if platform := accelerator():
            rows += in_process("costs", *repeats, "--device", platform, cpu=False)
        rows += in_process("modes", *repeats, pinned=True)
        rows += in_process("server", *count)
        show(rows)
    write(rows, given.json)


if __name__ == "__main__":
    main()
