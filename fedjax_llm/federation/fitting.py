"""How many clients run at once: as many as the device's memory holds, found out by compiling.

What XLA keeps while it computes (activations, copies, gradients of every example) follows from
fusion and scheduling, and no formula of ours would know it: a compiled program states it.
"""

from collections.abc import Callable

import jax

from fedjax_llm.errors import UserError

# What is left to the allocator's gaps, and to what is on the device beside the program.
_SHARE = 0.9
# On a CPU products gain from rows of several clients up to about so many: measured with decoders
# 64 and 288 wide, see experiments/benchmarks/README.md.
_ROWS_ON_CPU = 512
_GAP = 0.05


def memory_of(device: jax.Device) -> int | None:
    """Bytes that a device can give to programs; None where it does not say, as a CPU."""
    found = device.memory_stats() or {}
    return found.get("bytes_limit") if device.platform != "cpu" else None


def usable(memory: int) -> int:
    """Bytes of a device's memory that a program may take."""
    return int(memory * _SHARE)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of one device that a compiled program takes: what goes in and out, and its scratch.

    What lies in the host's memory is not among them. A CPU has no other memory than that, and its
    programs count it.

    Raises:
        UserError: a backend that does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise UserError("this device does not tell what a program takes; set clients_at_once")
    taken = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return int(taken)


def on_a_cpu(clients: int, rows: int) -> int:
    """Clients at once on a CPU, where batching makes products longer and nothing else faster.

    The last group is filled with clients that do not count, and takes as long as the others: as
    many as leave next to no gap.

    Args:
        clients: that a device has in all.
        rows: positions of one client's micro-batch.
    """
    most = max(1, min(clients, _ROWS_ON_CPU // max(rows, 1)))
    return next(
        group for group in range(most, 0, -1) if -clients % group <= _GAP * clients or group == 1
    )


def evened(clients: int, group: int) -> int:
    """The fewest at once that make no more groups: 5 and 5 of ten, rather than 8 and 2.

    >>> evened(10, 8), evened(64, 16), evened(3, 8)
    (5, 16, 3)
    """
    groups = -(-clients // group)
    return -(-clients // groups)


def most_that_fit(bytes_of: Callable[[int], int], clients: int, memory: int) -> int:
    """The largest power of two of clients, or all, whose program fits.

    One and two are compiled, what more would take is estimated from them, and the answer is
    compiled to make sure: a program that is larger than estimated is halved until it fits.

    Args:
        bytes_of: compiles for so many clients at once and returns the program's bytes.
        clients: that a device has in all.
        memory: bytes of a device.

    Raises:
        UserError: one client does not fit.
    """
    limit = usable(memory)
    one = bytes_of(1)
    if one > limit:
        raise UserError(
            f"one client takes {one / 2**30:.2f} GiB and a device gives {limit / 2**30:.2f}; lower "
            "microbatch, set remat = true, or spread the model over more devices"
        )
    if clients == 1:
        return 1
    each = max(bytes_of(2) - one, 1)
    guess = 1 + (limit - one) // each
    group = clients if guess >= clients else 2 ** (guess.bit_length() - 1)
    while group > 1 and bytes_of(group) > limit:
        # From all to the power of two below.
        group = 2 ** ((group - 1).bit_length() - 1)
    return group
