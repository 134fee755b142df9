"""Two streams of random words: a public one that everybody can expand, and a secret one.

Both come from OpenSSL's ciphers through ``cryptography``, at gigabytes per second and core.
"""

import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedjax_llm.secure.sums import checked_round
from fedjax_llm_kernels.host_arrays import aligned_empty

_KEY_BYTES = 32
# Encrypted to yield the key stream; a megabyte at a time stays in the processor's cache.
_ZEROS = memoryview(bytes(2**20))


def _key_stream(encryptor: CipherContext, size: int) -> NDArray[np.uint8]:
    """The next ``size`` bytes."""
    # Some versions of the binding ask for room for one more block.
    out = aligned_empty((size + 64,), np.uint8)
    view = memoryview(out)
    for start in range(0, size, len(_ZEROS)):
        stop = min(start + len(_ZEROS), size)
        encryptor.update_into(_ZEROS[: stop - start], view[start : stop + 64])
    return out[:size]


class PublicStream:
    """ChaCha20 (RFC 8439) under a public key, at any position: where the polynomials a come from.

    Formal guarantee: none is needed but that nobody chose the stream. The key is a digest of the
    clouds' joint randomness (commit, then reveal), of the epoch and of the round.
    """

    def __init__(self, seed: bytes, epoch: bytes, round_number: int) -> None:
        """Derives the key of one round."""
        label = b"fedjax-llm public polynomial"
        fields = [label, seed, epoch, checked_round(round_number).to_bytes(8, "little")]
        transcript = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
        self._key = hashlib.sha256(transcript).digest()

    @property
    def key_words(self) -> NDArray[np.uint32]:
        """The key as 8 words, for expansion on an accelerator."""
        return np.frombuffer(self._key, "<u4").astype(np.uint32)

    def __call__(
        self, nonce: tuple[int, int, int], first_block: int, blocks: int
    ) -> NDArray[np.uint8]:
        """``blocks`` blocks of 64 bytes of the key stream, from block ``first_block`` on."""
        if not 0 <= first_block <= first_block + blocks <= 2**32:
            raise ValueError(f"a stream has 2^32 blocks, asked for {blocks} from {first_block}")
        start = b"".join(word.to_bytes(4, "little") for word in (first_block, *nonce))
        cipher = Cipher(algorithms.ChaCha20(self._key, start), mode=None)
        return _key_stream(cipher.encryptor(), 64 * blocks)


class SecretWords:
    """Uniform secret 32-bit words: AES-256-CTR under a key from the operating system.

    Formal guarantee: the words are indistinguishable from uniform ones (AES-256 as a pseudorandom
    permutation, 2^32 blocks at most); the key exists in this object only and is drawn anew for
    every object. Make one for every upload, and in the process that uses it.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        """Args: random: bytes of the operating system's generator."""
        cipher = Cipher(algorithms.AES(random(_KEY_BYTES)), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def draw(self, *shape: int) -> NDArray[np.uint32]:
        """The next words of the stream, in this shape."""
        stream = _key_stream(self._encryptor, 4 * math.prod(shape))
        return stream.view("<u4").reshape(shape)
