"""The parts of the comparison that need an accelerator, with what they are measured against.

`accelerator` trains task "billion": 16 clients x 2 steps x 1 x 1,024 tokens on a decoder of 1.24
billion weights drawn at random (`prepare.BILLION`), weights and products in bfloat16, adapters of
rank 8 on all projections in float32; on one device, in turn with the plain PyTorch and PEFT loop
where the device is NVIDIA's. Both read the same weights, which `prepare.py` draws on the machine.

Model FLOP utilisation is the operations that the round's arithmetic needs, over its seconds and
over the device's peak by its data sheet (`peaks`). They are counted from shapes, by
`fedjax_llm.clouds.training_flops`: 2 a weight and token forward and 2 backward, because the frozen
weights have no gradient; 6 a weight of the adapter; attention over the half of the positions that
a causal mask leaves; the head, and not the embedding, which is looked up. Activations computed
twice and masked products do not count. The peak that a large product reached on the machine stands
beside it.

`kernels` is the benchmark of the kernels, `kernels.py`, in a process of its own: of its rows, the
machine's and each form's share of its roofline.

Without an accelerator both print one line and have no row.
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from contests import Contest, Way
from peaks import peak_flops
from sides import CACHE, HERE, Side
from table import Row, row
from tasks import TASKS

TASK = "billion"
UTILISATION, AGAINST_LOOP = 40.0, 3.0
# Products round to 8 bits, in another order on each side. One client of this task, both sides on a
# CPU: 3e-4 nats in the first three steps, 4e-5 in the next three, while the loss fell by 0.3.
SAME_LOSS = 5e-3
# The form by hand of attention, which saves the most memory, and of all that a round has. A table
# says which form runs (`fedjax_llm_kernels.choice`); here both are tried, whatever it says.
BY_HAND = (("attention",), ("attention", "cross_entropy", "many_adapters"))
# A way that was tried is not compiled again when it takes part. Both sides are in the device's
# memory at a time: JAX takes three quarters of it at the start, the loop the rest as it needs it.
_COMPILED_ONCE = (("JAX_COMPILATION_CACHE_DIR", str(CACHE / "compiled")),)


def ways_of_ours(at_once: Sequence[int], written: Sequence[Sequence[str]] = ()) -> tuple[Way, ...]:
    """All clients at once with activations kept or computed twice, and fewer at once.

    Args:
        at_once: the most, and fewer.
        written: kernels whose forms by hand are tried together, with the most at once.
    """
    most, *fewer = (("--devices", "1", "--at-once", str(n)) for n in at_once)
    options = [most, (*most, "--remat"), *fewer]
    options += [(*most, "--pallas", *names) for names in written]
    return tuple(Way("ours", "ours.py", each, _COMPILED_ONCE) for each in options)


def ways_of_the_loop(device: str) -> tuple[Way, ...]:
    """As it is, and with `torch.compile`."""
    on = ("--device", device)
    return tuple(Way("plain-cuda", "plain_loop.py", each) for each in (on, (*on, "--compile")))


@dataclass(frozen=True)
class Device:
    """What JAX runs on.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: as JAX names it.
        jax: version.
        products: FLOP/s of a large bfloat16 product, as measured; NaN where it was not.
    """

    platform: str
    kind: str
    jax: str
    products: float = float("nan")

    @classmethod
    @functools.cache
    def found(cls, products: bool = False) -> "Device":
        """That of this machine; `products` are measured on a CPU only if asked for."""
        command = [sys.executable, HERE / "device.py", *["--products"] * products]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return cls(**json.loads(told.splitlines()[-1]))


@dataclass(frozen=True)
class Utilised(Contest):
    """A contest that tells how much of the device's peak our rounds use.

    Attributes:
        peak: FLOP/s of the device.
    """

    peak: float = float("nan")

    def own(self, name: str, side: Side, warm: int) -> list[Row]:
        rows = super().own(name, side, warm)
        if "flops" not in side.head:
            return rows
        seconds = rows[0]["measured"]
        work = side.head["flops"]
        share = 100 * work / seconds / self.peak
        told = f"{self.task}: {name}, model FLOP"
        return [
            *rows,
            row(f"{told} of a round", work / 1e12, "TFLOP"),
            row(f"{told} utilisation", share, "%", UTILISATION, least=True),
        ]


def contest(task: str, device: Device, peak: float) -> Utilised:
    """Ours on a device, against the loop where PyTorch has that device too."""
    torch_name = {"gpu": "cuda", "cpu": "cpu"}.get(device.platform)
    peers = {} if torch_name is None else {"plain loop": ways_of_the_loop(torch_name)}
    clients = TASKS[task].clients
    return Utilised(
        task,
        # On a CPU they would be interpreted.
        ways_of_ours((clients, clients // 4), () if device.platform == "cpu" else BY_HAND),
        peers,
        dict.fromkeys(peers, AGAINST_LOOP),
        TASKS[task].tokens,
        "tokens",
        # The first compiles; more is not needed to tell ways apart that differ by much.
        trial=2,
        same_loss=SAME_LOSS,
        peak=peak,
    )


def measured(contest: Utilised, device: Device, turns: int) -> list[Row]:
    """The rows of a contest and of what it ran on; of ours alone if the loop cannot be run.

    Whoever has no PyTorch for the device still learns what ours does with it.
    """
    start = f"{contest.task}: {device.kind},"
    rows = [
        row(f"{start} peak by its data sheet", contest.peak / 1e12, "TFLOP/s"),
        row(f"{start} a large product, measured", device.products / 1e12, "TFLOP/s"),
    ]
    if not contest.peers:
        print(f"{contest.task}: the plain loop is not measured on a {device.platform}", flush=True)
        return rows + contest.rows(turns)
    try:
        return rows + contest.rows(turns)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{contest.task}: not measured against the plain loop: {error}", flush=True)
    return rows + replace(contest, peers={}, bars={}).rows(turns)


def accelerator(turns: int) -> list[Row]:
    """Utilisation of a round of a billion weights, and tokens a second against the plain loop."""
    device = _present("accelerator")
    if device is None:
        return []
    return measured(contest(TASK, device, peak_flops(device.kind)), device, turns)


def kernels(turns: int) -> list[Row]:
    """Each kernel's share of its roofline; the turns are its own."""
    return [] if _present("kernels") is None else shares_of_rooflines()


def shares_of_rooflines(*options: str) -> list[Row]:
    """Of the rows of `kernels.py`: the machine's, and the share of each kernel and form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, HERE.parent / "kernels.py", "--json", path, *options]
        # Its own table, with the times, goes to standard error: these rows are printed again.
        subprocess.run(command, check=True, stdout=sys.stderr)
        rows: list[Row] = json.loads(path.read_text())
    return [
        each | {"name": f"kernels: {each['name']}"}
        for each in rows
        if each["name"].startswith("machine:") or each["name"].endswith("of the roofline")
    ]


def _present(part: str) -> Device | None:
    """The accelerator, or a line that says why the part is not measured."""
    device = Device.found()
    if device.platform != "cpu":
        return device
    print(
        f"{part}: not measured, JAX {device.jax} finds no accelerator on this machine", flush=True
    )
    return None
