"""Importing is free: no device is taken before the program that imports has said which."""

import subprocess
import sys

# In a process of its own, since this one has a backend.
EVERYTHING = """
import importlib, pkgutil, sys
import fedjax_llm, fedjax_llm_kernels
from jax._src.xla_bridge import backends_are_initialized

for package in (fedjax_llm, fedjax_llm_kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            if backends_are_initialized():
                sys.exit(f"{found.name} starts a backend when it is imported")
import jax
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count())
"""


def test_no_module_starts_a_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        capture_output=True,
        text=True,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-2000:]
