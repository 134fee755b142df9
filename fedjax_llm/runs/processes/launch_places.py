"""What each of several processes on one machine has of it: cores, GPUs, and its environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm.runs.processes.cluster import ADDRESS, PROCESS, PROCESSES


@dataclass(frozen=True)
class Place:
    """What one process has of the machine.

    Attributes:
      cores: to which it is bound; () for all.
      gpus: that it sees; () for a CPU run.
    """

    cores: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()


def places(
    processes: int, cores: Sequence[int], gpus: Sequence[int] = (), *, bind: bool = True
) -> list[Place]:
    """Divides a machine among processes, equally: the slowest sets the pace of all.

    Args:
      processes: how many.
      cores: that may be used.
      gpus: all of them; () for a CPU run.
      bind: whether each process keeps to cores of its own. Cores that are left over serve nobody.

    Raises:
      UserError: fewer than one process, more than there are cores or GPUs, or GPUs that do not
        divide.
    """
    if processes < 1:
        raise UserError(f"--processes must be at least 1, got {processes}")
    if gpus and processes > len(gpus):
        raise UserError(
            f"--processes {processes} is more than the {len(gpus)} GPUs of this machine; use at "
            f"most {len(gpus)}, or set JAX_PLATFORMS=cpu"
        )
    if gpus and len(gpus) % processes:
        raise UserError(
            f"--processes {processes} does not divide the {len(gpus)} GPUs of this machine; use "
            f"{_words(_divisors(len(gpus)))}, or choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if processes > len(cores):
        raise UserError(
            f"--processes {processes} is more than the {len(cores)} cores that this process may "
            f"use; use at most {len(cores)}"
        )
    each, of_gpus = len(cores) // processes, len(gpus) // processes
    return [
        Place(
            tuple(cores[k * each : (k + 1) * each]) if bind else (),
            tuple(gpus[k * of_gpus : (k + 1) * of_gpus]),
        )
        for k in range(processes)
    ]


def environment(
    base: Mapping[str, str], port: int, places: Sequence[Place], process: int
) -> dict[str, str]:
    """The environment of one process: the starter's own, and how it finds the others.

    The coordinator listens to this machine alone: it does not ask who speaks to it.
    """
    address = f"127.0.0.1:{port}"
    found = {
        **base,
        ADDRESS: address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        PROCESSES: str(len(places)),
        PROCESS: str(process),
    }
    if places[process].gpus:
        found["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, places[process].gpus))
    return found


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _words(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
