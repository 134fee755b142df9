"""Held-out loss of every client under an adapter, as one program.

Rows of all clouds are put in one table and cut into micro-batches of a fixed size, which are
spread over the devices; a row's loss therefore has the same bytes on one device and on several.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.federation.layout import CLIENTS, CohortLayout
from fedjax_llm.lora import Adapter
from fedjax_llm.models import Batch

PyTree = Any
BatchLoss = Callable[[PyTree, Adapter, Batch], tuple[jax.Array, jax.Array]]


class HeldOut:
    """The clouds' evaluation rows on the devices, and the compiled program that measures them.

    Args:
        layout: the devices.
        batches: one table of rows a client, numpy arrays of the same length T.
        batch_loss: `(base, adapter, batch) -> (nll_B in nats, tokens_B)`.
        microbatch: rows whose activations are in memory at once on a device.
    """

    def __init__(
        self,
        layout: CohortLayout,
        batches: Sequence[Batch],
        batch_loss: BatchLoss,
        microbatch: int,
    ) -> None:
        self._rows = [len(batch.tokens_BxT) for batch in batches]
        table = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        missing = -len(table.tokens_BxT) % (layout.places * microbatch)

        def cut(leaf: np.ndarray) -> np.ndarray:
            padded = np.pad(leaf, [(0, missing), (0, 0)])
            return padded.reshape(-1, microbatch, leaf.shape[1])

        self._table = layout.rows(jax.tree.map(cut, table))

        def on_device(shared: PyTree, rows: Batch) -> tuple[jax.Array, jax.Array]:
            base, adapter = shared
            barrier = jax.lax.optimization_barrier

            def measured(batch: Batch) -> tuple[jax.Array, jax.Array]:
                # XLA takes a loop of one turn apart and fuses its body with what is around it.
                return barrier(batch_loss(base, adapter, barrier(batch)))

            return jax.lax.map(measured, rows)

        measured = layout.on_all_devices(on_device, CLIENTS)
        # Read on the host, which may hold some of the devices only.
        self._measure = jax.jit(lambda *given: layout.everywhere(measured(*given)))

    def sums(self, base: PyTree, adapter: Adapter) -> list[tuple[float, int]]:
        """Returns the loss in nats summed over the tokens of each table, and their number."""
        nll, tokens = jax.device_get(self._measure((base, adapter), self._table))
        nll_N = np.asarray(nll, np.float64).reshape(-1)
        tokens_N = np.asarray(tokens, np.int64).reshape(-1)
        ends = np.cumsum(self._rows)
        return [
            (float(nll_N[end - rows : end].sum()), int(tokens_N[end - rows : end].sum()))
            for end, rows in zip(ends, self._rows, strict=True)
        ]

    def losses(
        self, base: PyTree, adapters: Iterable[Adapter], members: Mapping[str, Sequence[int]]
    ) -> dict[str, float]:
        """Returns each cloud's loss in nats per token that counts.

        Args:
            base: on the devices.
            adapters: on the devices; one for all clients, or one of each, which are taken one by
                one.
            members: the clients of each cloud, by its name.
        """
        found = [self.sums(base, adapter) for adapter in adapters]
        losses = {}
        for name, clients in members.items():
            # A client with an adapter of its own is measured with that one.
            sums = [found[k if len(found) > 1 else 0][k] for k in clients]
            tokens = sum(count for _, count in sums)
            losses[name] = sum(nll for nll, _ in sums) / max(tokens, 1)
        return losses

    @property
    def rows(self) -> int:
        """Rows of all clouds together."""
        return sum(self._rows)
