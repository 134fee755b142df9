"""The peak of an accelerator by its data sheet, from the name that JAX gives to it.

The figures and where they come from are those of the package's catalogue of clouds: dense matrix
products in bfloat16, without sparsity. Names are taken as they are and never in part: the PCIe card
of a generation is another than its SXM module, and slower.
"""

from fedjax_llm.clouds import load_catalogue
from fedjax_llm.errors import UserError

# JAX's `device_kind` and the catalogue's accelerator. NVIDIA's names are its driver's.
KINDS = {
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
}


def peak_flops(kind: str) -> float:
    """Floating-point operations a second of bfloat16 products, by the data sheet.

    Args:
        kind: of the device, as JAX names it.

    Raises:
        UserError: the kind is not in the table.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    if kind not in KINDS:
        raise UserError(
            f"the peak of a device of kind {kind!r} is not known; add it to KINDS in "
            "experiments/benchmarks/peers/peaks.py, and its data sheet to "
            "fedjax_llm/clouds/catalogue.toml"
        )
    return load_catalogue().accelerators[KINDS[kind]].bf16_tflops * 1e12
