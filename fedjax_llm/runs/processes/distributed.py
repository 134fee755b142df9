"""Several processes as one run: how this one joins the others, and how it leaves them.

All processes run the same programs in the same order, each on its own devices; the first one alone
writes the run folder and prints.
"""

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.runs.processes.cluster import check_local, cluster, gpus, stated, tpu_chips

LIFELINE = "FEDJAX_LLM_LIFELINE"
# After so many seconds without a sign of life, the coordination service ends all processes. The
# signs come from a thread of JAX's own, so that no computation holds them up.
HEARTBEAT_SECONDS = 100
SHUTDOWN_SECONDS = 24 * 3600
PATIENCE_SECONDS = 300.0


class PeerLost(FedJaxError):
    """Another process of the run ended, and this one cannot go on without it."""

    exit_code = 4


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
      process: which one this is, from 0.
      processes: how many there are.
    """

    process: int = 0
    processes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes the run folder and prints."""
        return self.process == 0


def join(environment: Mapping[str, str] = os.environ, patience: float = PATIENCE_SECONDS) -> World:
    """Joins the other processes of this run, if it has any. Call it before JAX computes anything.

    Args:
      environment: of this process.
      patience: seconds to wait for the others.

    Raises:
      UserError: the environment contradicts itself, more processes than accelerators on this
        machine, or the others cannot be reached. Where the others do not come in time, the process
        ends with that line.
    """
    known = stated(environment)
    starter = "the environment" if known else cluster(environment, bool(tpu_chips()))
    if starter is None or (known and known.processes == 1):
        return World()
    if LIFELINE in environment:
        end_with_starter(int(environment[LIFELINE]))
    local = environment.get("SLURM_LOCALID") or environment.get("OMPI_COMM_WORLD_LOCAL_RANK")
    if local is not None and "JAX_LOCAL_DEVICE_IDS" not in environment:
        check_local(int(local), len(gpus(environment)))
    import jax

    who = f"process {known.process} of {known.processes}" if known else "this process"
    where = known.address if known else f"the address that {starter} tells"
    late = threading.Timer(patience, _give_up, (who, where, patience))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator_address=known.address if known else None,
            num_processes=known.processes if known else None,
            process_id=known.process if known else None,
            cluster_detection_method="deactivate" if known else None,
            # JAX ends the process with a trace of its own at this time: ours has to come before.
            initialization_timeout=int(patience) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            # The others are through when the first one begins with audit and report.
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if starter == "TPU" and "coordinator_address" in str(error):
            return World()  # one host with its chips
        raise UserError(
            f"{who} cannot join the others at {where}: {_one_line(error)}; see that the address is "
            "that of the first process and its port is free"
        ) from None
    finally:
        late.cancel()
    world = World(jax.process_index(), jax.process_count())
    if world.processes > 1 and jax.default_backend() == "cpu":
        _keep_stdout_to_python()
    return world


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone.

    JAX has no type of its own for it: the text is that of the transport or of its coordinator.
    """
    words = str(error)
    return (
        joined()
        and isinstance(error, RuntimeError | ValueError)
        and any(
            mark in words
            for mark in ("Gloo", "NCCL", "coordination service", "CoordinationService")
        )
    )


def joined() -> bool:
    """Whether this process has joined others; without importing JAX for the question."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(code: int) -> None:
    """Ends a process of several that failed, at once; returns where all is well, or it is alone.

    Python's way out would wait for the others, which wait for this one in the next sum.
    """
    if code and joined():
        _end(code)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _give_up(who: str, where: str, seconds: float) -> None:
    print(
        f"fedjax-llm: {who} has waited {seconds:.0f} s for the others at {where}; see that all "
        "were started with the same address and number, and that the port is open between them",
        file=sys.stderr,
    )
    _end(UserError.exit_code)


def end_with_starter(descriptor: int) -> None:
    """Ends this process when the one that started it is gone, however that ended.

    The other end of the pipe closes with the starter, a kill included; a computation that waits
    for another process in C++ would hear of nothing else.
    """

    def watch() -> None:
        os.read(descriptor, 1)
        os._exit(PeerLost.exit_code)

    threading.Thread(target=watch, daemon=True).start()


def _keep_stdout_to_python() -> None:
    """Gloo writes a line to standard output for each group of devices; it goes nowhere.

    What Python prints takes a copy of the descriptor.
    """
    if sys.stdout is None or sys.stdout.fileno() != 1:
        return
    sys.stdout.flush()
    copy = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(copy, "w", encoding=sys.stdout.encoding, buffering=1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
