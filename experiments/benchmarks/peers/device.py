"""What our JAX runs on, as one JSON object; started by accelerator.py.

A process of its own: whoever asks a device for its name holds its memory from then on, and the
driver has to leave that to the sides.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

# Beside it is what the kernels' benchmark measures a machine with.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import peak_flops


def main() -> None:
    """Prints platform, kind, JAX's version and, of an accelerator or if asked, its products."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", action="store_true", help="measure them on a CPU too")
    asked = parser.parse_args()
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    found = {"platform": device.platform, "kind": device.device_kind, "jax": jax.__version__}
    if asked.products or not cpu:
        found["products"] = peak_flops(False, cpu, jnp.bfloat16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
