"""Shamir's secret sharing of residue vectors, coefficient by coefficient, modulo a prime.

A. Shamir, "How to share a secret", CACM 22(11), 1979.

Sharing is linear, so it commutes with everything linear that happens to a key: the sum of the
shares of several secrets is a share of their sum, and residues in evaluation (NTT) form may be
shared as they are, because the NTT is linear as well.

Python's integers are exact and not constant-time: whoever can time a party's process closely
already runs code on the machine that holds its secret.
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
    coefficients = [secret_N.astype(object)]
    for _ in range(threshold - 1):
        coefficients.append(uniform_residues(secret_N.size, modulus).astype(object))
    shares = {}
    for point in points:
        value = coefficients[-1]
        for lower in reversed(coefficients[:-1]):
            value = (value * point + lower) % modulus
        shares[point] = value.astype(np.uint64)
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
    """``weight * share mod modulus``, exactly."""
    scaled = share_N.astype(object) * weight % modulus
    return np.asarray(scaled.astype(np.uint64))
