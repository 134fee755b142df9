"""What importing the kernels costs: nothing of Pallas, which few programs run."""

import subprocess
import sys

CODE = """
import sys
from fedjax_llm_kernels import attention_fused, clip_sum, cross_entropy, low_rank, many_adapters
from fedjax_llm_kernels import quantise_pack, ring
print("jax.experimental.pallas" in sys.modules)
from fedjax_llm_kernels import attention_gpu
print("jax.experimental.pallas" in sys.modules)
"""


def test_pallas_is_imported_by_who_runs_it_alone() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    # The second line says that the first could be true.
    assert run.stdout.split() == ["False", "True"]
