"""A secret of 32 bytes as t of n shares: Shamir's scheme over one field that holds it whole.

``shamir`` shares long vectors over the small primes of a cipher. Here the secrets are single keys
of 256 bits, so that the field is that of the prime p = 2^256 + 297: every 32 bytes are one of its
elements, nothing is cut into limbs, and a share has 33 bytes.

A. Shamir, "How to share a secret", CACM 22(11), 1979.

Python's integers are exact and not constant-time, as in ``shamir``.
"""

import secrets
from collections.abc import Mapping, Sequence

from fedjax_llm.errors import UserError

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Shares of 32 bytes, any ``threshold`` of which determine them.

    Formal guarantee: any ``threshold - 1`` shares are uniform in the field and independent of the
    secret, whatever it is. This is unconditional, given the operating system's randomness.

    | input | behaviour |
    |---|---|
    | a point that is 0 modulo the prime, or repeated | ``UserError``: it would be the secret |
    | ``threshold`` below 1 or above the number of points | ``UserError`` |
    | another length than 32 bytes | ``UserError`` |

    Args:
        secret: 32 bytes.
        threshold: number of shares that determine the secret.
        points: distinct non-zero evaluation points, one per recipient.

    Returns:
        point -> share, 33 bytes.
    """
    if len({point % PRIME for point in points} - {0}) != len(points):
        raise UserError(f"Shamir points must be distinct and non-zero, got {list(points)}")
    if not 1 <= threshold <= len(points):
        raise UserError(f"threshold must be in [1, {len(points)}], got {threshold}")
    if len(secret) != SECRET_BYTES:
        raise UserError(f"a secret to share must have {SECRET_BYTES} bytes, got {len(secret)}")
    highest_first = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    highest_first.append(int.from_bytes(secret, "little"))
    shares = {}
    for point in points:
        value = 0
        for coefficient in highest_first:
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def is_share(data: bytes) -> bool:
    """Whether these bytes are an element of the field in its only form."""
    return len(data) == SHARE_BYTES and int.from_bytes(data, "little") < PRIME


def rebuild(shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes | None:
    """The secret that these shares determine.

    It cannot tell a wrong share from a right one: compare the result with what is known of it.

    Args:
        shares: point -> share.
        weights: ``shamir.lagrange_at_zero`` of these points modulo ``PRIME``.

    Returns:
        32 bytes, or None if the shares determine an element that is no secret.
    """
    total = sum(weights[point] * int.from_bytes(data, "little") for point, data in shares.items())
    value = total % PRIME
    return value.to_bytes(SECRET_BYTES, "little") if value < 2**256 else None
