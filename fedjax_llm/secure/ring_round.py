"""The server of one round of ring-LWE messages: one accumulator, however many clients.

It adds words. Nothing it holds is secret, and nothing it is sent can be opened before the clouds
have decrypted the sum of the clients' secrets.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.ciphertext_round import CiphertextSum
from fedjax_llm.secure.intake import Intake
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.residues import Residues
from fedjax_llm.secure.ring_message import RingClient
from fedjax_llm.secure.streams import PublicStream
from fedjax_llm.secure.sums import Costs, RoundNumbers, WrongSum, checked_clients
from fedjax_llm_kernels import ring as kernel
from fedjax_llm_kernels.host_arrays import aligned_empty
from fedjax_llm_kernels.ring_parameters import CBD_ETA


class RingRound:
    """The ``RoundSum`` of mode ``threshold``.

    Any residues are a valid message of a hostile client, as any update is: bits beyond a prime are
    read modulo it. What does not carry the client's MAC never gets that far (``intake``).
    """

    def __init__(
        self,
        client: RingClient,
        holders: KeyHolders,
        channels: Channels,
        round_number: int,
        numbers: RoundNumbers,
        minimum_clients: int,
    ) -> None:
        """An empty sum.

        Args:
            client: the public side of this run: parameters, joint key.
            holders: the clouds.
            channels: the server's side of the clients' channels.
            round_number: above that of any total taken before.
            numbers: remembers whose total was taken.
            minimum_clients: fewest clients of a sum.
        """
        numbers.check(round_number)
        self._client, self._holders, self._round = client, holders, round_number
        self._numbers, self._minimum = numbers, minimum_clients
        self._costs = Costs()
        self._intake = Intake(
            lambda name: client.header(name, round_number),
            channels,
            client.payload_bytes,
            client.layout.parameters.summands,
            costs=self._costs,
        )
        self._key_sum = CiphertextSum(client.key_layer.bfv, 1)
        self._stream = PublicStream(client.key.seed, client.key.epoch, round_number)
        ring, layout = client.layout.ring, client.layout
        shape = (layout.elements, ring.limbs, ring.size)
        # One array each: adding donates its buffer.
        self._totals = [jnp.zeros(shape, jnp.uint32) for _ in range(layout.chunks)]
        self._staged = aligned_empty((layout.chunk_bytes,), np.uint8)
        self._added_lazily = 0
        self._taken = False

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads have been added, sorted."""
        return self._intake.participants

    @property
    def costs(self) -> Costs:
        """What the round has cost so far."""
        return self._costs

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds one client's upload, all of it or nothing; see ``RoundSum.add``."""
        with self._intake.adding(client, upload, partial(self._check, client)) as received:
            if self._added_lazily == self._client.layout.ring.lazy_additions:
                self._reduce()
            for number, payload in enumerate(received.payloads()):
                if number == 0:
                    self._key_sum.add(payload)
                else:
                    self._add_chunk(number - 1, payload)
            self._added_lazily += 1

    def _check(self, client: str, number: int, payload: memoryview) -> None:
        if number == 0:
            self._key_sum.check(payload, client)

    def _add_chunk(self, chunk: int, payload: memoryview) -> None:
        # JAX reads an aligned buffer where it lies; of any other it makes a copy in new memory.
        np.copyto(self._staged, np.frombuffer(payload, np.uint8))
        added = kernel.add(self._client.layout.ring, self._totals[chunk], self._staged)
        self._totals[chunk] = added.block_until_ready()  # before the buffer is written again

    def _reduce(self) -> None:
        ring = self._client.layout.ring
        for chunk, total in enumerate(self._totals):
            self._totals[chunk] = kernel.reduce(ring, total)
        self._added_lazily = 0

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total; see ``RoundSum.pieces``. It may be asked for again if a cloud was missing."""
        layout, ring = self._client.layout, self._client.layout.ring
        self._intake.require_whole()
        names = self.participants
        checked_clients(names, self._minimum, layout.parameters.summands)
        self._holders.check_alive(alive)
        if self._holders.key.epoch != self._client.key.epoch:
            raise Refused(f"keys were rotated after round {self._round} began; start it anew")
        if not self._taken:
            self._numbers.take(self._round)
            self._taken = True
        self._intake.close()
        partials = self._holders.decrypt(
            self._round, names, self._key_sum.c0(), self._key_sum.c1(), 1, alive, self._costs
        )
        with self._costs.timed("decrypt"):
            secret_N = self._unsealed(partials)
            secret_hat = kernel.transform_secret(ring, jnp.asarray(secret_N))
        left = layout.count
        for chunk, total in enumerate(self._totals):
            with self._costs.timed("unmask"):
                piece = self._opened(chunk, total, secret_hat)
            yield piece[:left]
            left -= piece.size

    def _unsealed(self, partials: Mapping[str, Residues]) -> NDArray[np.int32]:
        """The sum of the participants' secrets."""
        slots = self._key_sum.fuse(partials)[0]
        try:
            return self._client.key_layer.unseal(slots, len(self.participants))
        except WrongSum as err:
            raise WrongSum(f"round {self._round}, {', '.join(partials)}: {err}") from err

    def _opened(self, chunk: int, total: jax.Array, secret_hat: jax.Array) -> NDArray[np.int64]:
        """The sum of one chunk, int64 [per_chunk]."""
        layout, clients = self._client.layout, len(self.participants)
        a_hat = layout.public(self._stream, chunk)
        values, noise, above = kernel.unmask(
            layout.ring, total, a_hat, secret_hat, jnp.int32(clients)
        )
        rows = np.asarray(values).reshape(layout.elements, -1)
        bound = clients * layout.parameters.max_abs
        right = (
            (rows[:, 0] == clients).all()
            and int(above) == 0
            and int(noise) <= CBD_ETA * clients
            and -bound <= int(rows.min()) <= int(rows.max()) <= bound
        )
        if not right:
            raise WrongSum(
                f"round {self._round}: the sum of {clients} clients does not open (canary of chunk "
                f"{chunk + 1} of {layout.chunks}): a client has sent what is no encryption, or the "
                "clouds have decrypted another sum; nothing is returned"
            )
        return rows[:, 1:].astype(np.int64).reshape(-1)
