"""The masks: one key stream per pair of clients, and one per client, over the words of a chunk.

| symbol | name | meaning |
|---|---|---|
| x_i | | client i's words modulo 2^m |
| b_i | self seed | 32 secret bytes of client i, fresh in every round |
| k_ij | pair key | 32 bytes that clients i and j alone can compute, fresh in every round |
| y_i | upload | x_i + G(b_i) + sum over j > i of G(k_ij) - sum over j < i of G(k_ij) |

G is AES-256 in counter mode: chunk c takes the blocks from c * 2^18 * (bytes per word) / 16 on, so
that every chunk can be expanded without those before it, and no block serves twice under a key.

Over a set of clients that all sent an upload, the pair masks cancel and the self masks remain.
Where k_ij is unknown, y_i is uniform, whatever x_i: that is the use of the pair masks. The self
mask is there for an upload that arrives after its sender was given up and its pair keys revealed.

Formal guarantee. G(k) for a uniform k cannot be told from uniform words but with the advantage
against AES-256 as a pseudorandom permutation plus B^2 / 2^129 for B blocks (a permutation does not
repeat a block; 134 million words of 4 bytes are B = 2^25 blocks, hence 2^-79).

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017,
section 4.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedjax_llm.secure.masked_layout import CHUNK_WORDS, Words

SEED_BYTES = 32


@dataclass(frozen=True)
class Stream:
    """One mask: its key, and whether it is subtracted."""

    key: bytes
    subtract: bool

    def __repr__(self) -> str:
        """Without the key."""
        return f"Stream(subtract={self.subtract})"

    @property
    def inverse(self) -> "Stream":
        """What takes this mask away again."""
        return Stream(self.key, not self.subtract)


def self_stream(seed: bytes) -> Stream:
    """The mask that client i puts on its own words."""
    return Stream(_from_seed(seed, b"fedjax-llm self mask"), subtract=False)


def pair_stream(key: bytes, own: str, other: str) -> Stream:
    """The mask that ``own`` puts on for the pair: one of the two adds, the other subtracts."""
    return Stream(key, subtract=own > other)


def fingerprint(seed: bytes) -> bytes:
    """32 bytes by which everybody can check a seed b_i that was rebuilt from shares.

    Formal guarantee: next to ``self_stream`` it tells nothing of a uniform seed (both are outputs
    of HKDF-Expand under it, a pseudorandom function), and no second seed with the same
    fingerprint can be found (SHA-256 is collision-resistant).
    """
    return _from_seed(seed, b"fedjax-llm self mask fingerprint")


def add_streams(words: Words, streams: Iterable[Stream], chunk: int) -> None:
    """Adds these masks for one chunk to ``words``, in place, modulo the word."""
    zeros = bytes(words.nbytes)
    # Some versions of the binding ask for room for one more block.
    room = np.empty(words.nbytes + 64, np.uint8)
    stream = room[: words.nbytes].view(words.dtype)
    first_block = chunk * CHUNK_WORDS * words.itemsize // 16
    for mask in streams:
        counter = modes.CTR(first_block.to_bytes(16, "big"))
        Cipher(algorithms.AES256(mask.key), counter).encryptor().update_into(zeros, room.data)
        if mask.subtract:
            np.subtract(words, stream, out=words)
        else:
            np.add(words, stream, out=words)


def _from_seed(seed: bytes, info: bytes) -> bytes:
    return HKDFExpand(SHA256(), SEED_BYTES, info).derive(seed)
