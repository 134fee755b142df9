"""Residues on the wire: each in exactly as many bits as its prime has, as planes of bits.

Layout (a wire format). A payload is K elements, one after the other; an element is its L limbs, one
after the other; a limb is N residues of b bits. b is split into powers of two, the largest first
(27 = 16 + 8 + 2 + 1), and each part w is a plane that holds w bits of all N residues, the lowest
bits in the first plane. A plane of w bits is N * w / 32 words of 32 bits, little-endian on the
wire, and its word m holds the residues m, m + N w / 32, m + 2 N w / 32, .. in its bits 0 .. w-1,
w .. 2w-1, ..: residue i has its bits in word i mod (N w / 32) from bit w * (i div (N w / 32)) on.
Neighbours in a plane are neighbours in memory, so packing is shifts of whole rows and nothing else.

Any bits are valid: a field of b bits at or above its prime stands for itself modulo the prime.
"""

import jax
import jax.numpy as jnp

# Residues as rows of N / 32: 2 x 2 x 2 x 2 x 2 of them. A plane of w bits has w rows.
FOLDED = (2, 2, 2, 2, 2)


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """The planes of a residue of this many bits: (width, lowest bit).

    >>> planes(27)
    ((16, 0), (8, 16), (2, 24), (1, 26))
    """
    parts, low = [], 0
    for width in (16, 8, 4, 2, 1):
        if bits & width:
            parts.append((width, low))
            low += width
    return tuple(parts)


def pack(residues: jax.Array, bits: int) -> list[jax.Array]:
    """The planes of one limb.

    Args:
      residues: u32[R, ...] below 2^bits, R a multiple of 32: the N residues row by row.
      bits: Bits of each.

    Returns:
      u32[R * w / 32, ...] for each plane of w bits.
    """
    rows = residues.shape[0]
    packed = []
    for width, low in planes(bits):
        groups = residues.reshape(32 // width, rows * width // 32, *residues.shape[1:])
        word = None
        for group in range(32 // width):
            field = groups[group] >> low
            if group + 1 < 32 // width:  # the last group's upper bits leave the word by themselves
                field = field & ((1 << width) - 1)
            field = field << (width * group)
            word = field if word is None else word | field
        assert word is not None
        packed.append(word)
    return packed


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`, by rows: u32[R * bits / 32, ...] to u32[R, ...]."""
    rows = words.shape[0] * 32 // bits
    residues = None
    start = 0
    for width, low in planes(bits):
        plane = words[start : start + rows * width // 32]
        start += plane.shape[0]
        fields = [plane >> (width * group) for group in range(32 // width)]
        field = (jnp.concatenate(fields) & ((1 << width) - 1)) << low
        residues = field if residues is None else residues | field
    assert residues is not None
    return residues


def unpack_folded(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`, u32[N * bits / 32] to u32[2, 2, 2, 2, 2, N / 32], by broadcasting.

    The five axes are the five highest bits of a residue's number; a plane of w = 2^d bits has the
    last d of them and is the same, but for a shift, along the others. XLA makes one loop of it.
    """
    size = words.shape[0] * 32 // bits
    residues = None
    start = 0
    for width, low in planes(bits):
        plane = words[start : start + size * width // 32]
        start += plane.shape[0]
        depth = width.bit_length() - 1
        shift = jnp.zeros((2,) * (5 - depth) + (1,) * (depth + 1), jnp.uint32)
        for axis in range(5 - depth):
            step = width << (4 - depth - axis)
            shift = shift + step * jax.lax.broadcasted_iota(jnp.uint32, shift.shape, axis)
        folded = plane.reshape((1,) * (5 - depth) + (2,) * depth + (size // 32,))
        field = ((folded >> shift) & ((1 << width) - 1)) << low
        residues = field if residues is None else residues | field
    assert residues is not None
    return jnp.broadcast_to(residues, (*FOLDED, size // 32))
