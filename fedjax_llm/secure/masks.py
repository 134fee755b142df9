"""Masks that cancel: what makes the answers of several clouds useless but for their sum.

Why flooding alone is not enough. Given the shares of t - 1 clouds, every other cloud's share is
an affine function of the joint secret, whose slope is a Lagrange coefficient p / q of small
integers modulo Q. One answer then holds (p / q) E plus flooding, E being the ciphertext's noise,
and an error of size Q / q_0 does not hide E modulo q: 3 with 2 of 3 clouds, and more than E
itself with 5 of 10, which gives E, hence the joint secret. It takes t - 1 clouds outside of the
decrypting set, or a set of more than t, and a server that merely looks.

Formal guarantee. Every pair of clouds shares a key (X25519 in the key ceremony) and adds,
respectively subtracts, the same SHAKE-256 stream for this statement (epoch, round, sum and set:
``decryption``). To whoever lacks the keys of the pairs among the honest clouds, the first answers
of the honest clouds of a set are uniform but for their sum, and if one of these is not given,
uniform and independent: nothing at all (SHAKE-256 as a pseudorandom function, the gap
Diffie-Hellman assumption). In that sum the slopes add up to one. Masks of different statements
are independent.

| case | effect |
|---|---|
| all clouds of the set answer for the same statement | masks cancel exactly |
| a cloud is missing, or answered for another statement | the fused values are uniform: no result |

Source: Bonawitz et al., CCS 2017, section 4 (pairwise masks); Cramer, Damgard, Ishai, TCC 2005
(pseudorandom sharings of zero).
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.residues import Residues, add


def expand(seed: bytes, modulus: int, count: int) -> NDArray[np.uint64]:
    """``count`` integers in [0, modulus) from SHAKE-256; rejection keeps them uniform."""
    mask = np.uint64((1 << modulus.bit_length()) - 1)
    label = b"fedjax-llm uniform" + modulus.to_bytes(8, "little") + seed
    out = np.empty(count, np.uint64)
    filled = block = 0
    while filled < count:
        stream = hashlib.shake_256(block.to_bytes(8, "little") + label).digest(8 * (count + 64))
        drawn = np.frombuffer(stream, "<u8") & mask
        good = drawn[drawn < modulus][: count - filled]
        out[filled : filled + good.size] = good
        filled, block = filled + good.size, block + 1
    return out


def mask(
    own: str,
    clouds: Sequence[str],
    keys: Mapping[str, bytes],
    statement: bytes,
    chunk: int,
    moduli: Sequence[int],
    size: int,
) -> Residues:
    """What cloud ``own`` adds to its answer, [1, L, N]; over all of ``clouds`` it adds up to zero.

    Args:
        own: the cloud that answers.
        clouds: the decrypting set, ``own`` included.
        keys: for every other cloud, the 32 secret bytes shared with it.
        statement: its digest, 32 bytes: another statement, other masks.
        chunk: index of the ciphertext.
        moduli: primes of the limbs.
        size: N.
    """
    primes = np.asarray(moduli, np.uint64)[None, :, None]
    total: Residues = np.zeros((1, len(moduli), size), np.uint64)
    for other in clouds:
        if other == own:
            continue
        seed = keys[other] + statement + chunk.to_bytes(8, "little")
        shared = np.stack([expand(seed, modulus, size) for modulus in moduli])[None]
        if own > other:  # one adds, the other subtracts
            shared = (primes - shared) % primes
        total = add(total, shared, moduli)
    return total
