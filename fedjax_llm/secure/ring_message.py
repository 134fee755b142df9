"""A client's upload under ring-LWE: its secret for the clouds, its parameters for the server.

Chunk 0 holds the client's fresh secret s, encrypted under the clouds' joint OpenFHE key. Chunks
1, 2, ... hold c_k = a_k s + e_k + T_k, ring element after ring element (``ring_table`` has the
symbols). Both add up: the clouds decrypt the sum of the secrets, with which the server unmasks the
sum of the T_k, and nothing else (Willow, ePrint 2024/936, without its verifiers).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.joint_key import JointKey
from fedjax_llm.secure.key_layer import KeyLayer
from fedjax_llm.secure.ring_table import RingParameters
from fedjax_llm.secure.streams import PublicStream, SecretWords
from fedjax_llm.secure.sums import checked_ints
from fedjax_llm.secure.wire import Header, UploadWriter, parameters_digest
from fedjax_llm_kernels import ring as kernel
from fedjax_llm_kernels.host_arrays import aligned_empty
from fedjax_llm_kernels.ring_parameters import Ring

KIND = "threshold"
_CHUNK_BYTES = 2**21


@dataclass(frozen=True)
class RingLayout:
    """How a message of ``count`` integers is cut into chunks, all alike.

    Attributes:
        parameters: the ring.
        count: P.
    """

    parameters: RingParameters
    count: int

    @property
    def ring(self) -> Ring:
        """The ring."""
        return self.parameters.ring

    @cached_property
    def elements(self) -> int:
        """Ring elements per chunk: of one size, so that one compiled program does for all.

        One or two megabytes, whatever wastes the fewest elements at the end.
        """
        needed = -(-self.count // self.parameters.per_element)
        most = min(needed, max(1, _CHUNK_BYTES // self.ring.payload_bytes_per_element))
        return min(range(most, most // 2, -1), key=lambda size: -(-needed // size) * size)

    @property
    def chunks(self) -> int:
        """Chunks of parameters, without the one of the secret."""
        return -(-self.count // self.per_chunk)

    @property
    def per_chunk(self) -> int:
        """Integers per chunk; the last one is filled up with zeros."""
        return self.elements * self.parameters.per_element

    @property
    def chunk_bytes(self) -> int:
        """Payload of one chunk."""
        return self.elements * self.ring.payload_bytes_per_element

    def compile(self) -> None:
        """Compiles what client and server run in a round, side by side, so that no round waits."""
        ring, shape = self.ring, (self.elements, self.ring.limbs, self.ring.size)
        words_N = jnp.zeros((3, ring.size), jnp.uint32)
        words_KN = jnp.zeros((3, self.elements, ring.size), jnp.uint32)
        values = jnp.zeros(self.elements * (1 + self.parameters.per_element), jnp.int32)
        payload = np.zeros(self.chunk_bytes, np.uint8)
        hat = jnp.zeros(shape[1:], jnp.uint32)

        def zeros() -> jax.Array:
            return jnp.zeros(shape, jnp.uint32)

        programs: list[Callable[[], Any]] = [
            lambda: kernel.encrypt(ring, values, zeros(), hat, words_KN),
            lambda: kernel.unmask(ring, zeros(), zeros(), hat, jnp.int32(1)),
            lambda: kernel.add(ring, zeros(), payload),
            lambda: kernel.prepare_secret(ring, words_N),
            lambda: kernel.transform_secret(ring, jnp.zeros(ring.size, jnp.int32)),
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jax.block_until_ready(list(pool.map(lambda program: program(), programs)))

    def public(self, stream: PublicStream, chunk: int) -> jax.Array | NDArray[np.uint32]:
        """The polynomials a of one chunk, u32 [K, L, N] in transformed order.

        On a CPU OpenSSL expands them; elsewhere the accelerator itself does.
        """
        first = chunk * self.elements
        if jax.default_backend() == "cpu":
            return kernel.uniform_host(self.ring, stream, first, self.elements)
        words = jnp.asarray(stream.key_words)
        return kernel.uniform(self.ring, words, first, self.elements)


def _with_canaries(layout: RingLayout, ints_P: NDArray[np.integer]) -> NDArray[np.int32]:
    """int [K per_element] -> int32 [K (1 + per_element)]: the number 1 in front of each element."""
    shape = layout.elements, 1 + layout.parameters.per_element
    rows = aligned_empty(shape, np.int32)
    rows[:, 0] = 1
    rows[:, 1:] = ints_P.reshape(layout.elements, -1)
    return rows.reshape(-1)


@dataclass(frozen=True)
class RingClient:
    """A client's side; all that it needs besides its own integers is public, but the channel key.

    Attributes:
        layout: ring and length.
        key_layer: the ciphertext that carries the secret.
        key: the clouds' joint key, its epoch and the seed of the public polynomials; a client that
            got it over the network checks it first (``joint_key.check_confirmations``).
    """

    layout: RingLayout
    key_layer: KeyLayer
    key: JointKey

    @cached_property
    def _public_key(self) -> Any:
        return self.key_layer.bfv.public_key(self.key.residues_2LN)

    @property
    def payload_bytes(self) -> tuple[int, ...]:
        """Of every chunk of an upload."""
        return (self.key_layer.payload_bytes, *[self.layout.chunk_bytes] * self.layout.chunks)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name all parameters; see ``wire.parameters_digest``."""
        parameters, ring = self.layout.parameters, self.layout.ring
        own = (ring.size, *ring.primes, ring.digit_bits, ring.digits, ring.scale_bits)
        shape = (self.layout.count, parameters.max_abs, parameters.summands)
        return parameters_digest(KIND, *shape, self.key_layer.bfv.digest(), *own)

    def header(self, client: str, round_number: int) -> Header:
        """What this client's chunks say of themselves."""
        return Header(KIND, self.digest, self.key.epoch, round_number, self.layout.count, client)

    def upload(
        self,
        client: str,
        channel_key: bytes,
        round_number: int,
        pieces: Iterable[NDArray[np.integer] | jax.Array],
    ) -> Iterator[bytes]:
        """The chunks of one upload, each made when it is asked for.

        Formal guarantee. Without the shares of t clouds, the chunks of all clients are
        indistinguishable from those of any other integers with the same sum over the clients,
        even given that sum, provided that two of the clients are honest: ring-LWE for the
        parameters given the sum of the secrets (Hint-RLWE, see ``ring_table``), semantic security
        of the key layer for the secrets (``bfv``), and pseudorandom words (``streams``).
        Secret and errors are drawn anew at each call, so that two uploads of the same integers
        differ; of two uploads in one round the server must not decrypt both sums, which is what
        ``cloud_party`` refuses.

        Args:
            client: who sends.
            channel_key: 32 bytes shared with the server.
            round_number: for which sum.
            pieces: the integers in order, in arrays of any length, ``count`` in all; so a client
                may read its update from a file and hold one piece at a time.

        Raises:
            Refused: an integer beyond the bound, or fewer or more of them than ``count``; the
                upload breaks off, and the server adds nothing of it.
        """
        layout, ring = self.layout, self.layout.ring
        writer = UploadWriter(self.header(client, round_number), channel_key, 1 + layout.chunks)
        stream = PublicStream(self.key.seed, self.key.epoch, round_number)
        secret = SecretWords()
        secret_N, secret_hat = kernel.prepare_secret(ring, jnp.asarray(secret.draw(3, ring.size)))
        yield writer.write(self.key_layer.seal(self._public_key, np.asarray(secret_N)))
        for chunk, ints in enumerate(self._cut(client, pieces)):
            values = _with_canaries(layout, ints)
            a_hat = layout.public(stream, chunk)
            words = secret.draw(3, layout.elements, ring.size)
            yield writer.write(np.asarray(kernel.encrypt(ring, values, a_hat, secret_hat, words)))

    def _cut(
        self, client: str, pieces: Iterable[NDArray[np.integer] | jax.Array]
    ) -> Iterator[NDArray[np.integer]]:
        """The same integers in arrays of ``per_chunk``, checked; the last one is filled up.

        An array is good until the next one is asked for.
        """
        size, seen, filled = self.layout.per_chunk, 0, 0
        buffer = np.zeros(size, np.int32)
        for piece in pieces:
            ints = checked_ints(client, piece, len(piece), self.layout.parameters.max_abs)
            seen += ints.size
            if seen > self.layout.count:
                break
            at = 0
            while at < ints.size:
                if not filled and ints.size - at >= size:
                    yield ints[at : at + size]  # whole: nothing to copy together
                    at += size
                    continue
                take = min(size - filled, ints.size - at)
                buffer[filled : filled + take] = ints[at : at + take]
                filled, at = filled + take, at + take
                if filled == size:
                    yield buffer
                    filled = 0
        if seen != self.layout.count:
            raise Refused(
                f"client {client!r} must send {self.layout.count} integers, got "
                f"{'more' if seen > self.layout.count else seen}"
            )
        if filled:
            buffer[filled:] = 0
            yield buffer
