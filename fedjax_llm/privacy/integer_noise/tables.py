"""Alias tables: integer noise drawn exactly from uniform bits.

Letter: L columns of a table, a power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
from numpy.typing import NDArray

from . import weights

WORD_BITS = 32
LIMBS = 6
# Every probability of a table is a multiple of 2^-192.
DRAW_BITS = LIMBS * WORD_BITS
# Mass that may be cut off with the tails. The cost of what is missing grows with e^epsilon (see
# `accounting.certified_epsilon`): this much leaves epsilons of up to 70 certifiable, and adds
# little to the bound, 14.7 standard deviations where 2^-80 would need 10.4.
_TAIL = 160
# What every table of up to 2^17 columns stays below: 2^-160 of tails, 2^17 masses rounded down by
# at most 2^-192 each, and the error of the weights, 2^-170.
MAX_TOTAL_VARIATION = 2.0**-159


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keep_6xL", "alias_L"],
    meta_fields=["bound", "total_variation"],
)
@dataclass(frozen=True, eq=False)
class NoiseTable:
    """A distribution on the integers from -bound to bound, for `draw` and `draw_secret`.

    A pytree: pass it to a jitted function as an argument, or it is baked in as a constant;
    `jax.device_put` spares the transfer where it is used often.

    Formal guarantee: given uniform words, `draw_secret` has exactly the distribution
    `masses` / 2^192, which is symmetric and at most `total_variation` from the one asked for.

    Walker's alias method (doi:10.1145/355744.355749) in exact integers. A draw takes six words:
    the low log2(L) bits of the third choose column c; all other bits are a number u below
    2^192 / L. If u is below keep[c], the value is c - bound, otherwise alias[c] - bound. The first
    three words decide but for one draw in 2^79, so the others are drawn only when they matter.

    Attributes:
        keep_6xL: uint32, keep[c] in limbs, most significant first; the third has
            32 - log2(L) bits.
        alias_L: int32, a column.
        bound: largest absolute value of a draw; at most 2^16.
        total_variation: distance from the distribution asked for, per draw; an upper bound.
    """

    keep_6xL: NDArray[np.uint32] = field(repr=False)
    alias_L: NDArray[np.int32] = field(repr=False)
    bound: int
    total_variation: float

    @property
    def column_bits(self) -> int:
        """log2(L)."""
        return self.alias_L.shape[0].bit_length() - 1

    def masses(self) -> list[int]:
        """Probabilities of -bound ... bound in units of 2^-192; they add up to 2^192."""
        capacity = 1 << (DRAW_BITS - self.column_bits)
        mass = [0] * self.alias_L.shape[0]
        for column, limbs in enumerate(np.asarray(self.keep_6xL).T.tolist()):
            keep = join(limbs, self.column_bits)
            mass[column] += keep
            mass[int(self.alias_L[column])] += capacity - keep
        if any(mass[2 * self.bound + 1 :]):
            raise AssertionError("a column beyond the bound can be drawn")
        return mass[: 2 * self.bound + 1]


def widths(column_bits: int) -> list[int]:
    """Bits of each limb of a threshold."""
    return [WORD_BITS - column_bits if limb == 2 else WORD_BITS for limb in range(LIMBS)]


def join(limbs: Sequence[int], column_bits: int) -> int:
    """The number that limbs stand for."""
    number = 0
    for limb, bits in zip(limbs, widths(column_bits), strict=True):
        number = number << bits | limb
    return number


def build(weights_X: Sequence[int]) -> NoiseTable:
    """The table of a symmetric distribution.

    Args:
        weights_X: weights of 0, 1, 2, ...; -x weighs as much as x. See `weights`.
    """
    total = 2 * sum(weights_X) - weights_X[0]
    bound, tail = len(weights_X) - 1, 0
    while bound and (2 * (tail + weights_X[bound])) << _TAIL <= total:
        tail += weights_X[bound]
        bound -= 1
    # Rounded down, what is missing goes to zero: the table stays symmetric and only one value is
    # more likely than it should be, so that its excess is the total variation.
    mass_X = [(weight << DRAW_BITS) // total for weight in weights_X[: bound + 1]]
    missing = (1 << DRAW_BITS) - 2 * sum(mass_X) + mass_X[0]
    mass_X[0] += missing
    column_bits = (2 * bound).bit_length()
    keep_6xL, alias_L = _alias([*mass_X[:0:-1], *mass_X], column_bits)
    excess = float(np.nextafter(missing * 2.0**-DRAW_BITS, 1))
    return NoiseTable(keep_6xL, alias_L, bound, excess + weights.ERROR)


def _alias(mass: Sequence[int], column_bits: int) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Thresholds and aliases of masses that add up to 2^192."""
    columns, capacity = 1 << column_bits, 1 << (DRAW_BITS - column_bits)
    rest = [*mass, *[0] * (columns - len(mass))]
    # A column that ends up full is its own alias, so its threshold does not matter.
    keep, alias = [0] * columns, list(range(columns))
    small = [column for column, value in enumerate(rest) if value < capacity]
    large = [column for column, value in enumerate(rest) if value > capacity]
    while small:  # then some column holds more than its share, because the mean is the capacity
        column, donor = small.pop(), large[-1]
        keep[column], alias[column] = rest[column], donor
        rest[donor] -= capacity - rest[column]
        if rest[donor] <= capacity:
            large.pop()
            if rest[donor] < capacity:
                small.append(donor)
    limbs: list[list[int]] = []
    for bits in reversed(widths(column_bits)):
        limbs.append([value & ((1 << bits) - 1) for value in keep])
        keep = [value >> bits for value in keep]
    return np.array(limbs[::-1], np.uint32), np.array(alias, np.int32)
