"""Between integers and residues: packing, noise, the Chinese remainder theorem and decoding.

All functions work elementwise over arrays of any one shape, one array for each digit, limb or word,
so the XLA and the Pallas programs share them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .ring_arithmetic import Machine, at_most_once, shoup
from .ring_parameters import Ring
from .ring_tables import MESSAGE_WORD_BITS, tables


def centred_binomial(first: jax.Array, second: jax.Array, third: jax.Array) -> jax.Array:
    """The number of ones in 96 bits, u32 in [0, 96]: the centred binomial sample plus 48.

    Formal guarantee. For uniform independent bits the sample less 48 is the centred binomial
    distribution with eta = 48: mean 0, variance 24, magnitude at most 48.
    """
    # A full adder over 32 columns: two population counts instead of three.
    odd = first ^ second
    carry = (first & second) | (odd & third)
    return jax.lax.population_count(odd ^ third) + 2 * jax.lax.population_count(carry)


def message_words(ring: Ring, values: Sequence[jax.Array]) -> list[jax.Array]:
    """T in words of 26 bits, lowest first, from i32 values, one array for each digit of T.

    A digit outside [0, 2^beta) runs into its neighbours: the caller has checked the values.
    """
    digits = [(value + jnp.int32(ring.offset)).astype(jnp.uint32) for value in values]
    words = []
    for low in range(0, ring.message_bits, MESSAGE_WORD_BITS):
        word = jnp.zeros_like(digits[0])
        for j, digit in enumerate(digits):
            shift = ring.scale_bits + ring.digit_bits * j - low
            if 0 <= shift < MESSAGE_WORD_BITS:
                word = word | (digit << shift)
            elif -ring.digit_bits < shift < 0:
                word = word | (digit >> -shift)
        words.append(word & ((1 << MESSAGE_WORD_BITS) - 1))
    return words


def residues_to_words(
    ring: Ring, residues: Sequence[jax.Array], machine: Machine
) -> list[jax.Array]:
    """The integer in [0, q) with these canonical residues, as 32-bit words, lowest first.

    Garner's mixed radix, v = v_0 + q_0 (v_1 + q_1 (v_2 + ..)) with v_i < q_i, then Horner's rule
    from the inside out, on words.
    """
    mixed: list[jax.Array] = []
    for i, row in enumerate(tables(ring).garner):
        q = jnp.uint32(ring.primes[i])
        x = residues[i]
        for (w, w_shoup, multiple), smaller in zip(row, mixed, strict=True):
            difference = x + (jnp.uint32(multiple) - smaller)
            x = shoup(difference, jnp.uint32(w), jnp.uint32(w_shoup), q, machine.mulhi)
        mixed.append(at_most_once(x, q) if i else x)

    mixed = machine.settle(mixed)
    words = [mixed[-1]]
    bound = ring.primes[-1]
    for i in reversed(range(ring.limbs - 1)):
        q = jnp.uint32(ring.primes[i])
        bound *= ring.primes[i]
        carry = mixed[i]
        longer = []
        for word in words:
            low = word * q + carry
            carry = machine.mulhi(word, q) + (low < carry).astype(jnp.uint32)
            longer.append(low)
        if bound.bit_length() > 32 * len(longer):
            longer.append(carry)
        words = machine.settle(longer)
    return words


def decode(
    ring: Ring, words: Sequence[jax.Array], clients: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Digits, noise and what is above the digits, of T + noise + 2^(scale_bits - 1) in words.

    The half is added before the residues become an integer, where it wraps around q: a negative
    noise on T = 0 then is no number next to q.

    Args:
      ring: The packing.
      words: As `residues_to_words` gives them.
      clients: i32 scalar, how many messages are in the sum.

    Returns:
      The k sums of values, i32; the magnitude of the noise, i32; the bits above the top digit, u32,
      all zero unless something is wrong.
    """
    values = [
        _field(words, ring.scale_bits + ring.digit_bits * j, ring.digit_bits).astype(jnp.int32)
        - clients * jnp.int32(ring.offset)
        for j in range(ring.digits)
    ]
    half = 1 << (ring.scale_bits - 1)
    noise = jnp.abs(_field(words, 0, ring.scale_bits).astype(jnp.int32) - half)
    above = jnp.zeros_like(words[0])
    for low in range(ring.message_bits, 32 * len(words), 32):
        above = above | _field(words, low, 32)
    return values, noise, above


def _field(words: Sequence[jax.Array], low: int, width: int) -> jax.Array:
    """Bits low .. low + width - 1, width at most 32, of an integer in 32-bit words."""
    index, shift = divmod(low, 32)
    field = words[index] >> shift
    if shift + width > 32 and index + 1 < len(words):
        field = field | (words[index + 1] << (32 - shift))
    return field if width == 32 else field & ((1 << width) - 1)
