"""Who started this process, and with how many others: read from its environment.

Under Slurm, Open MPI, Kubernetes and on a TPU pod JAX finds the other processes by itself, and all
that has to be known is that there are some. `fedjax-llm launch`, and any other starter, says it in
three variables:

JAX_COORDINATOR_ADDRESS  host:port at which the first process listens; the same for all
JAX_NUM_PROCESSES        how many there are
JAX_PROCESS_ID           which one this is, from 0
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedjax_llm.errors import UserError

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclass(frozen=True)
class Stated:
    """What the three variables say.

    Attributes:
      address: host:port of the first process.
      processes: how many there are.
      process: which one this is.
    """

    address: str
    processes: int
    process: int


def stated(environment: Mapping[str, str]) -> Stated | None:
    """What the starter says by the three variables; None where it leaves that to JAX.

    An address alone is not enough to go by: JAX takes it beside what a cluster tells.

    Raises:
      UserError: only some of them are set, or one is no number in its range.
    """
    if PROCESSES not in environment and PROCESS not in environment:
        return None
    missing = [name for name in (ADDRESS, PROCESSES, PROCESS) if not environment.get(name)]
    if missing:
        raise UserError(
            f"{ADDRESS}, {PROCESSES} and {PROCESS} go together, and {', '.join(missing)} is not "
            "set; set all three, or none"
        )
    processes = _number(environment, PROCESSES, 1, None)
    process = _number(environment, PROCESS, 0, processes)
    address = environment[ADDRESS]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS} must be host:port, got {address!r}; as 10.0.0.1:6789")
    return Stated(address, processes, process)


def cluster(environment: Mapping[str, str], chips: bool = False) -> str | None:
    """Under what several processes were started whose peers JAX finds; None for one process.

    Args:
      environment: of this process.
      chips: whether a TPU is attached to this machine: then its metadata may name other hosts.

    Raises:
      UserError: a pod of an indexed Kubernetes job, where JAX lacks what it finds the others with.
    """
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    # SLURM_STEP_NODELIST is what srun adds: the batch script itself is no process of the run.
    step = "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment
    if step and environment.get("SLURM_NTASKS", "1") != "1":
        return "Slurm"
    workers = (
        environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    )
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if chips or "," in workers or slices != "1" or "TPU_PROCESS_ADDRESSES_PATH" in environment:
        return "TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes job, and JAX finds its peers by the "
                f"package kubernetes; install jax[k8s], or set {ADDRESS}, {PROCESSES} and "
                f"{PROCESS} as experiments/cluster/jobset.yaml does"
            )
        return "Kubernetes"
    return None


def check_local(local: int, accelerators: int) -> None:
    """Refuses a process for which the machine has no accelerator left; 0 of them is a CPU run.

    Raises:
      UserError: as said.
    """
    if 0 < accelerators <= local:
        raise UserError(
            f"process {local} of this machine has no GPU: there are {accelerators}, and each "
            f"process takes one; start at most {accelerators} a machine, or set "
            "JAX_LOCAL_DEVICE_IDS"
        )


def gpus(environment: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """The NVIDIA GPUs that JAX could use, numbered as it numbers them; without starting JAX."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if "cpu" in platforms[:1] or not any(map(importlib.util.find_spec, plugins)):
        return ()
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(range(len([one for one in visible.split(",") if one.strip()])))
    return tuple(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))


def tpu_chips() -> list[Path]:
    """Device files of TPU chips, where JAX could use them."""
    if importlib.util.find_spec("libtpu") is None:
        return []
    return [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]


def _number(environment: Mapping[str, str], name: str, least: int, below: int | None) -> int:
    words = environment[name]
    if not words.isdecimal() or int(words) < least or (below is not None and int(words) >= below):
        limit = f"at least {least}" if below is None else f"in [{least}, {below - 1}]"
        raise UserError(f"{name} must be a whole number {limit}, got {words!r}")
    return int(words)
