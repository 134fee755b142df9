"""Constants of a ring, worked out once in Python's big integers: twiddles, CRT, Garner.

The transform is the negacyclic one of Longa and Naehrig (arXiv 1604.04600): with psi a primitive
2N-th root of unity mod q, its butterflies multiply by psi^bitrev(m + i), block i of the m blocks of
a level, and the factor of X^N + 1 needs no pass of its own.

N = A * B. Coefficient a * B + b is at [a, b]; a level with m < A blocks pairs rows and its twiddle
is one number per pair of rows, [m + i]. Then the array is transposed to [b, a], and a level with
A * m' blocks, block a * m' + i', pairs rows again: its twiddles are [m' + i', a], one for a lane.
The transform domain keeps that order, [b, a]: since the public polynomial is drawn there, no
reordering is ever needed.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .ring_arithmetic import Words
from .ring_parameters import Ring

MESSAGE_WORD_BITS = 26


@dataclass(frozen=True)
class Pair:
    """Constants w and their Shoup companions floor(w 2^32 / q), of one shape."""

    w: Words
    shoup: Words


@dataclass(frozen=True)
class Transform:
    """Twiddles of one direction: one for each pair of rows, and one for each pair and lane."""

    rows_LxA: Pair
    lanes_LxBxA: Pair


@dataclass(frozen=True)
class Tables:
    """All constants of a ring; the axis of length L or the first axis runs over the primes.

    `garner[i][j]`, j < i: the inverse of prime j modulo prime i, as (w, Shoup companion), and the
    multiple of prime i that is at least prime j.
    """

    q_L: Words
    barrett_L: Words  # floor(2^32 / q)
    companion_L: Words  # floor(2^(31 + bits) / q): from it a Shoup companion is made on the device
    shift_L: Words  # 32 - bits
    lift_L: Words  # the smallest multiple of q that is at least 2^26
    half_L: Words  # 2^(scale_bits - 1) mod q
    inverse_size_L: Pair  # 1 / N
    forward: Transform
    inverse: Transform
    message_LxW: Pair  # 2^(26 w) mod q for the message words w
    garner: tuple[tuple[tuple[int, int, int], ...], ...]


def shoup_pair(w: NDArray[np.object_] | list[int], q: NDArray[np.object_] | int) -> Pair:
    """Shoup pairs of big integers w < q, elementwise."""
    exact = np.asarray(w, object)
    return Pair(exact.astype(np.uint32), ((exact << 32) // q).astype(np.uint32))


@lru_cache(maxsize=16)
def tables(ring: Ring) -> Tables:
    """The constants of a ring; a fraction of a second, then remembered."""
    primes, n = ring.primes, ring.size
    psi = [_root(prime, 2 * n) for prime in primes]
    forward = [_twiddles(n, root, prime) for root, prime in zip(psi, primes, strict=True)]
    inverse = [
        _twiddles(n, pow(root, -1, prime), prime) for root, prime in zip(psi, primes, strict=True)
    ]
    q_L = np.array(primes, object)
    words = -(-ring.message_bits // MESSAGE_WORD_BITS)
    return Tables(
        q_L=q_L.astype(np.uint32),
        barrett_L=((1 << 32) // q_L).astype(np.uint32),
        companion_L=np.array(
            [(1 << 31 + prime.bit_length()) // prime for prime in primes], np.uint32
        ),
        shift_L=np.array([32 - prime.bit_length() for prime in primes], np.uint32),
        lift_L=np.array([-(-(1 << 26) // prime) * prime for prime in primes], np.uint32),
        half_L=np.array([(1 << ring.scale_bits - 1) % prime for prime in primes], np.uint32),
        inverse_size_L=shoup_pair([pow(n, -1, prime) for prime in primes], q_L),
        forward=_transform(ring, np.array(forward)),
        inverse=_transform(ring, np.array(inverse)),
        message_LxW=shoup_pair(
            np.array(
                [[(1 << MESSAGE_WORD_BITS * w) % p for w in range(words)] for p in primes], object
            ),
            q_L[:, None],
        ),
        garner=tuple(
            tuple(_garner(prime, before) for before in primes[:i]) for i, prime in enumerate(primes)
        ),
    )


def _transform(ring: Ring, twiddles_LxN: NDArray[np.int64]) -> Transform:
    a, b = ring.lanes
    q_L = np.array(ring.primes, np.int64)
    # Level A * m', block a * m' + i': number A * m' + a * m' + i'. Row 0 is not used.
    lanes = np.zeros((ring.limbs, b, a), np.int64)
    m = 1
    while m < b:
        level = twiddles_LxN[:, a * m : 2 * a * m].reshape(-1, a, m)
        lanes[:, m : 2 * m] = np.swapaxes(level, 1, 2)
        m *= 2
    return Transform(_pair(twiddles_LxN[:, :a], q_L[:, None]), _pair(lanes, q_L[:, None, None]))


def _pair(w: NDArray[np.int64], q: NDArray[np.int64]) -> Pair:
    return Pair(w.astype(np.uint32), ((w << 32) // q).astype(np.uint32))  # w < 2^27: 59 bits


def _twiddles(n: int, root: int, prime: int) -> list[int]:
    """root^bitrev(i) for i < n."""
    powers = [1]
    half = n // 2
    while half:
        step = pow(root, half, prime)
        powers += [power * step % prime for power in powers]
        half //= 2
    return powers


def _root(prime: int, order: int) -> int:
    """An element of this order, a power of two: of the smallest base that gives one."""
    for base in range(2, prime):
        root = pow(base, (prime - 1) // order, prime)
        if pow(root, order // 2, prime) == prime - 1:
            return root
    raise ValueError(f"{prime} has no root of unity of order {order}")


def _garner(prime: int, before: int) -> tuple[int, int, int]:
    w = pow(before, -1, prime)
    return w, (w << 32) // prime, -(-before // prime) * prime
