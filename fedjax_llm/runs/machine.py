"""What a run ran on: package versions and the machine, without anything that names its owner."""

import os
import platform
from importlib import metadata
from typing import Any

# Those whose version can change a result or its price.
PACKAGES = (
    "fedjax-llm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "openfhe",
    "dp-accounting",
    "numpy",
    "tokenizers",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Version by distribution name, Python first; `missing` for what is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def machine() -> dict[str, Any]:
    """System, processor, cores this process may use, memory, and JAX's devices."""
    import jax

    devices = jax.devices()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def memory_bytes(kind: str) -> int:
    """A line of Linux's /proc/meminfo (`MemTotal`, `MemAvailable`) in bytes; 0 where unknown."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith(f"{kind}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return "unknown"
    return platform.processor() or "unknown"
