"""The public polynomial, expanded from a 32-byte key: uniform residues in the transform domain.

Definition. With word(s, l, n) the n-th 32-bit word of the ChaCha20 keystream (RFC 8439, counter
from 0) under the key and the nonce (l, s, 0), the residue of element e, limb l, coefficient i (in
the transform's own order) is

    x = word(0, l, e N + i) mod 2^b         if that is below the prime q_l, b its bit length.

The others of that element and limb are rejected; the j-th of them (j from 0, in the order of i)
is drawn again, once, as the 64-bit number (low word first)

    word(1 + j div 64, l, 128 e + 2 (j mod 64)), word(1 + j div 64, l, 128 e + 2 (j mod 64) + 1)

modulo q_l. Every element can be expanded by itself, and the second draws of many elements are one
short run of keystream, or rarely two.

Formal guarantee. Take the keystream for uniform bits. Given that x is accepted it is exactly
uniform. Otherwise it is a 64-bit number modulo q: every residue has conditional probability
floor(2^64 / q) or one more, over 2^64, so within a factor 1 +- q 2^-64 of 1 / q. With r <= 1/2 the
chance of a rejection, each residue has probability (1 / q) (1 + d), |d| <= r q 2^-64 < 2^-38. For M
residues the Renyi divergence of order 2 from the uniform distribution is at most (1 + 2^-76)^M: for
M = 2^50 residues, more than all rounds of a run, below 1 + 2^-25. What an attack finds with
probability P from these polynomials it finds with at least P^2 / (1 + 2^-25) from uniform ones (Bai
et al., ePrint 2015/483, section 2.3). For the advantage in telling ciphertexts from noise the
statistical distance counts, below M 2^-39 in the worst case; the same paper (section 4) carries the
order-2 bound over to such problems where, as here, a sample can be drawn for a given public matrix.
The polynomials are public and independent of every secret: nothing can leak through them.

| case | result |
|---|---|
| a block number would pass 2^32 | `ring.uniform` and `uniform_host` raise ValueError |
| 0 elements | an empty array |
"""

from collections.abc import Buffer, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .chacha import BLOCK_WORDS, keystream
from .host_arrays import aligned_empty
from .ring_arithmetic import MulHi, barrett, canonical, shoup
from .ring_parameters import Ring

# Second draws of an element and limb in one run of keystream: blocks, and 64-bit numbers.
_REDRAW_BLOCKS = 8
_REDRAWS = 8 * _REDRAW_BLOCKS

Keystream = Callable[[tuple[int, int, int], int, int], Buffer]


def uniform_device(
    ring: Ring, key_words: jax.Array, first_element: jax.Array, elements: int, mulhi: MulHi
) -> jax.Array:
    """u32[elements, L, N] on the device, see the module's definition."""
    n, limbs = ring.size, ring.limbs
    first = first_element.astype(jnp.uint32)
    prime_L = np.array(ring.primes, np.uint32)
    mask_L = np.array([(1 << prime.bit_length()) - 1 for prime in ring.primes], np.uint32)
    blocks = n // BLOCK_WORDS
    limb_B = jnp.repeat(jnp.arange(limbs, dtype=jnp.uint32), blocks)
    block_B = jnp.tile(jnp.arange(blocks, dtype=jnp.uint32), limbs)

    def one(element: jax.Array) -> jax.Array:
        words = keystream(key_words, (limb_B, 0, 0), element * blocks + block_B)
        return words.reshape(limbs, n) & mask_L[:, None]

    words = jax.lax.map(one, first + jnp.arange(elements, dtype=jnp.uint32))
    rejected = words >= prime_L[None, :, None]

    def draw_again(words: jax.Array) -> jax.Array:
        rows = elements * limbs
        upto = _prefix_sums(rejected.astype(jnp.int32)).reshape(rows, n)
        count = upto[:, -1]
        row = jnp.arange(rows, dtype=jnp.int32)
        limb = (row % limbs).astype(jnp.uint32)
        block = first + (row // limbs).astype(jnp.uint32)

        def draw_eight(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            group, words = state
            run = (1 + group // _REDRAW_BLOCKS).astype(jnp.uint32)
            within = (group % _REDRAW_BLOCKS).astype(jnp.uint32)
            stream = keystream(key_words, (limb, run, 0), block * _REDRAW_BLOCKS + within)
            for j in range(8):
                low, high = stream[:, 2 * j], stream[:, 2 * j + 1]
                residue = _modulo_64(ring, high, low, limb, mulhi)
                rank = 8 * group + j
                place = jnp.where(rank < count, _first_above(upto, rank), n)
                words = words.at[row, place].set(residue, mode="drop")
            return group + 1, words

        state = jnp.int32(0), words.reshape(rows, n)
        _, drawn = jax.lax.while_loop(lambda s: 8 * s[0] < jnp.max(count), draw_eight, state)
        return drawn.reshape(words.shape)

    return jax.lax.cond(jnp.any(rejected), draw_again, lambda words: words, words)


def _prefix_sums(x: jax.Array) -> jax.Array:
    """Sums of the last axis up to and with each entry; `jnp.cumsum` counts in 64 bits inside."""
    distance = 1
    while distance < x.shape[-1]:
        shifted = jnp.pad(x[..., :-distance], [(0, 0)] * (x.ndim - 1) + [(distance, 0)])
        x = jax.lax.optimization_barrier(x + shifted)
        distance *= 2
    return x


def _first_above(sorted_RxN: jax.Array, bound: jax.Array) -> jax.Array:
    """The first place in each row whose entry is above the bound; N, a power of two, if none is."""
    rows, n = sorted_RxN.shape
    row = jnp.arange(rows, dtype=jnp.int32)
    place = jnp.zeros(rows, jnp.int32)
    step = n
    while step:
        last = jnp.minimum(place + step, n) - 1
        below = (place + step <= n) & (sorted_RxN[row, last] <= bound)
        place = place + step * below.astype(jnp.int32)
        step //= 2
    return place


def _modulo_64(
    ring: Ring, high: jax.Array, low: jax.Array, limb: jax.Array, mulhi: MulHi
) -> jax.Array:
    """(2^32 high + low) modulo the prime of the limb."""
    factors = [(1 << 32) % prime for prime in ring.primes]
    constants = [
        (factor, (factor << 32) // prime, prime, (1 << 32) // prime)
        for factor, prime in zip(factors, ring.primes, strict=True)
    ]
    w, w_shoup, q, q_barrett = jnp.array(np.array(constants, np.uint32)).T[:, limb]
    total = shoup(high, w, w_shoup, q, mulhi) + barrett(low, q, q_barrett, mulhi)
    return canonical(total, q, q_barrett, mulhi)


def uniform_host(
    ring: Ring, keystream: Keystream, first_element: int, elements: int
) -> NDArray[np.uint32]:
    """The same array in numpy, with a keystream from elsewhere (OpenSSL's runs at gigabytes/s).

    Args:
      ring: The ring.
      keystream: `keystream(nonce_words, first_block, blocks)` gives 64 * blocks bytes of the
        ChaCha20 keystream under the key.
      first_element: Number of the first element, at least 0.
      elements: How many.

    Returns:
      u32[elements, L, N].

    Raises:
      ValueError: A block number would pass 2^32, or the keystream gave too few bytes.
    """
    n = ring.size
    check_blocks(ring, first_element, elements)
    residues = aligned_empty((elements, ring.limbs, n), np.uint32)
    for limb, prime in enumerate(ring.primes):
        words = _words(keystream, (limb, 0, 0), first_element * n // 16, elements * n // 16)
        mask = np.uint32((1 << prime.bit_length()) - 1)
        np.bitwise_and(words.reshape(elements, n), mask, out=residues[:, limb])
    prime_L = np.array(ring.primes, np.uint32)
    rejected = np.flatnonzero(residues >= prime_L[:, None])
    if not rejected.size:
        return residues
    row = rejected // n
    element, limb_of = np.divmod(row, ring.limbs)
    rank = np.arange(rejected.size) - np.searchsorted(row, row)
    first, blocks = first_element * _REDRAW_BLOCKS, elements * _REDRAW_BLOCKS
    draws = [
        [_words(keystream, (limb, 1 + turn, 0), first, blocks) for limb in range(ring.limbs)]
        for turn in range(1 + int(rank.max()) // _REDRAWS)
    ]
    numbers = np.array(draws, "<u4").view("<u8").reshape(-1, ring.limbs, elements, _REDRAWS)
    drawn = numbers[rank // _REDRAWS, limb_of, element, rank % _REDRAWS]
    residues.reshape(-1)[rejected] = drawn % prime_L.astype(np.uint64)[limb_of]
    return residues


def check_blocks(ring: Ring, first_element: int, elements: int) -> None:
    """Refuses elements whose blocks are not among the 2^32 of a ChaCha20 stream."""
    last = first_element + elements
    if first_element < 0 or elements < 0 or last * ring.size // BLOCK_WORDS > 1 << 32:
        raise ValueError(
            f"elements {first_element} to {last} are not within the 2^32 blocks of a ChaCha20 "
            "stream; use another key"
        )


def _words(
    keystream: Keystream, nonce_words: tuple[int, int, int], first_block: int, blocks: int
) -> NDArray[np.uint32]:
    stream = memoryview(keystream(nonce_words, first_block, blocks))
    if stream.nbytes != 64 * blocks:
        raise ValueError(
            f"{blocks} blocks are {64 * blocks} bytes, the keystream gave {stream.nbytes}"
        )
    return np.frombuffer(stream, "<u4")
