"""`fedjax-llm doctor`: checks what a run needs from this machine, and says how to mend it."""

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedjax_llm.runs import machine, text

LEAST_MEMORY = 6 * 2**30  # the quickstart's peak, with room for the system
LEAST_DISK = 2 * 2**30  # a model in the cache and a run folder

_MODULES = {"dp-accounting": "dp_accounting", "orbax-checkpoint": "orbax.checkpoint"}
_NOT_IMPORTED = {"fedjax-llm", "openfhe", "jaxlib"}  # OpenFHE has its own check, with its repair


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      what: what was checked.
      ok: whether a run can rely on it.
      detail: what was found.
      cure: what to do when it is not ok.
    """

    what: str
    ok: bool
    detail: str
    cure: str = ""


def examine() -> list[Finding]:
    """All checks in order; one that breaks unexpectedly is a finding like any other."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("jax", check_jax),
        ("openfhe", check_openfhe),
        ("memory", check_memory),
        ("disk", check_disk),
        ("models", check_models),
    ]
    return [_guarded(what, check) for what, check in checks]


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """OpenFHE publishes one binary, for CPython 3.12."""
    found = ".".join(str(part) for part in version)
    cure = "make the environment with CPython 3.12: OpenFHE's wheel has no other binary"
    return Finding("python", version[:2] == (3, 12), found, cure)


def check_packages() -> Finding:
    """Every package is installed and can be imported."""
    versions = machine.versions()
    broken = [name for name, version in versions.items() if version == "missing"]
    for name in versions.keys() - _NOT_IMPORTED - set(broken) - {"python"}:
        try:
            importlib.import_module(_MODULES.get(name, name))
        except ImportError:
            broken.append(name)
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
    if broken:
        found = f"cannot be imported: {', '.join(sorted(broken))}"
    return Finding("packages", not broken, found, "pip install -c constraints.txt -e .")


def check_jax() -> Finding:
    """A device computes."""
    import jax
    import jax.numpy as jnp

    devices = jax.devices()
    if float(jnp.ones(8, jnp.float32).sum()) != 8.0:
        return Finding("jax", False, "8 x 1 is not 8 on this device", "reinstall jax and jaxlib")
    return Finding(
        "jax", True, f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    )


def check_openfhe() -> Finding:
    """A real encryption, addition and decryption, after the repair that old C runtimes need."""
    from fedjax_llm.secure.openfhe_repair import import_openfhe

    notes: list[str] = []
    fhe = import_openfhe(notes.append)
    parameters = fhe.CCParamsBFVRNS()
    parameters.SetPlaintextModulus(65537)
    parameters.SetMultiplicativeDepth(0)
    context = fhe.GenCryptoContext(parameters)
    for feature in (fhe.PKE, fhe.LEVELEDSHE):
        context.Enable(feature)
    keys = context.KeyGen()
    left, right = (
        context.Encrypt(keys.publicKey, context.MakePackedPlaintext(values))
        for values in ([1, -2, 30000], [4, 5, -30001])
    )
    total = context.Decrypt(keys.secretKey, context.EvalAdd(left, right))
    total.SetLength(3)
    correct = list(total.GetPackedValue()) == [5, 3, -1]
    found = "; ".join(["encrypt, add and decrypt are exact" if correct else "wrong sum", *notes])
    return Finding("openfhe", correct, found, "pip install --force-reinstall openfhe")


def check_memory() -> Finding:
    """Enough free memory for the quickstart."""
    free, total = machine.memory_bytes("MemAvailable"), machine.memory_bytes("MemTotal")
    found = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"
    cure = f"the quickstart needs about {LEAST_MEMORY / 2**30:.0f} GiB; end other programs"
    return Finding("memory", free >= LEAST_MEMORY, found, cure)


def check_disk() -> Finding:
    """Enough free disk where runs and models go."""
    from fedjax_llm.models import hub

    places = [Path.cwd(), _existing(hub.cache_root())]
    free = min(shutil.disk_usage(place).free for place in places)
    cure = f"free some space under {places[0]} and {places[1]}, or set FEDJAX_LLM_CACHE"
    return Finding("disk", free >= LEAST_DISK, f"{text.bytes_text(free)} free", cure)


def check_models() -> Finding:
    """Which models are in the cache; none is no problem, a run fetches its own."""
    from fedjax_llm.models import hub

    held = [name for name in hub.REGISTRY if hub.cached(name)]
    found = f"in the cache: {', '.join(held) or 'none yet'} ({hub.cache_root()})"
    return Finding("models", True, found)


def print_report(findings: list[Finding]) -> bool:
    """Prints the findings as a table; returns whether all is well."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("problem", style="bold red")
        table.add_row(Text(finding.what), mark, Text(finding.detail))
        if not finding.ok and finding.cure:
            table.add_row("", "", Text(f"mend it: {finding.cure}"))
    console = Console()
    Console(width=console.width if console.is_terminal else 10_000).print(table)
    return all(finding.ok for finding in findings)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _guarded(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # the report is what a user has when things are broken
        line = " ".join(str(error).split()) or type(error).__name__
        return Finding(what, False, line, "see the README, or reinstall the environment")
