"""Shamir's secret sharing of residue vectors, coefficient by coefficient, modulo a prime.

A. Shamir, "How to share a secret", CACM 22(11), 1979.

Sharing is linear, so it commutes with everything linear that happens to a key: the sum of the
shares of several secrets is a share of their sum, and residues in evaluation (NTT) form may be
shared as they are, because the NTT is linear as well.

Arithmetic is V. Shoup's modular product by a known factor w: with w' = floor(w 2^64 / p), the
estimate h = floor(v w' / 2^64) is floor(v w / p) or one less, so that v w - h p, computed modulo
2^64, is the remainder or the remainder plus p (D. Harvey, "Faster arithmetic for number-theoretic
transforms", J. Symbolic Computation 2014, theorem 1). It holds for p < 2^63 and every v < 2^64, and
needs no branch and no division by a secret's side.
"""

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError


def uniform_residues(count: int, modulus: int) -> NDArray[np.uint64]:
    """``count`` integers uniform in [0, modulus) from the operating system's generator.

    Rejection sampling: there is no modulo bias. ``modulus`` is at most 2**63.
    """
    mask = np.uint64((1 << modulus.bit_length()) - 1)
    out = np.empty(count, np.uint64)
    filled = 0
    while filled < count:
        drawn = np.frombuffer(secrets.token_bytes(8 * (count - filled) + 64), "<u8") & mask
        good = drawn[drawn < modulus][: count - filled]
        out[filled : filled + good.size] = good
        filled += good.size
    return out


def split(
    secret_N: NDArray[np.uint64], modulus: int, threshold: int, points: Sequence[int]
) -> dict[int, NDArray[np.uint64]]:
    """Shares of a vector, any ``threshold`` of which determine it.

    Formal guarantee: any ``threshold - 1`` shares are uniform and independent of the secret.

    | input | behaviour |
    |---|---|
    | a point that is 0 modulo the prime, or repeated | ``UserError``: it would be the secret |
    | ``threshold`` below 1 or above the number of points | ``UserError`` |

    Args:
        secret_N: residues in [0, modulus).
        modulus: a prime; the caller vouches for its primality.
        threshold: number of shares that determine the secret.
        points: distinct non-zero evaluation points, one per recipient.

    Returns:
        point -> share, of the secret's shape.
    """
    if len({point % modulus for point in points} - {0}) != len(points):
        raise UserError(f"Shamir points must be distinct and non-zero, got {list(points)}")
    if not 1 <= threshold <= len(points):
        raise UserError(f"threshold must be in [1, {len(points)}], got {threshold}")
    _checked(secret_N, modulus)
    fresh = [uniform_residues(secret_N.size, modulus) for _ in range(threshold - 1)]
    coefficients = [secret_N, *fresh]
    shares = {}
    for point in points:
        value = coefficients[-1].copy()
        for lower in reversed(coefficients[:-1]):
            value = _reduced(scale(value, point, modulus) + lower, modulus)
        shares[point] = value
    return shares


def lagrange_at_zero(points: Sequence[int], modulus: int) -> dict[int, int]:
    """The weights with which the shares at ``points`` add up to the secret, modulo the prime."""
    if len({point % modulus for point in points} - {0}) != len(points):
        raise UserError(f"Shamir points must be distinct and non-zero, got {list(points)}")
    weights = {}
    for point in points:
        top = bottom = 1
        for other in points:
            if other != point:
                top = top * other % modulus
                bottom = bottom * (other - point) % modulus
        weights[point] = top * pow(bottom, -1, modulus) % modulus
    return weights


def scale(share_N: NDArray[np.uint64], weight: int, modulus: int) -> NDArray[np.uint64]:
    """``weight * share mod modulus``, exactly, for any integer ``weight``; see the module."""
    _checked(share_N, modulus)
    factor = weight % modulus
    low_half, shift = np.uint64(2**32 - 1), np.uint64(32)
    estimate_low, estimate_high = ((factor << 64) // modulus & 2**32 - 1), (factor << 32) // modulus
    low, high = share_N & low_half, share_N >> shift
    # The upper 64 bits of share * estimate, from four products of 32 by 32 bits.
    cross = high * np.uint64(estimate_low) + (low * np.uint64(estimate_low) >> shift)
    middle = (cross & low_half) + low * np.uint64(estimate_high)
    quotient = high * np.uint64(estimate_high) + (cross >> shift) + (middle >> shift)
    return _reduced(share_N * np.uint64(factor) - quotient * np.uint64(modulus), modulus)


def _reduced(values_N: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """Of values below twice the modulus; where it is not to be subtracted, that wraps to more."""
    return np.minimum(values_N, values_N - np.uint64(modulus))


def _checked(values_N: NDArray[np.uint64], modulus: int) -> None:
    if not 2 <= modulus < 2**63 or values_N.dtype != np.uint64 or (values_N >= modulus).any():
        raise UserError(
            f"Shamir shares are uint64 residues below a modulus of at most 63 bits, got "
            f"{values_N.dtype} modulo {modulus}"
        )
