"""Blinding: how values are disguised before they leave a cloud, so that equal ones can be matched.

Two ways, with one interface: `first` disguises one's own values, `second` is applied to what the
other party disguised. Elements that both have been through are equal exactly if the values are.

| way | disguise | who can test a guess of a text |
|---|---|---|
| `Commutative` | multiplication in the group of P-256 | a cloud, by entering it as a row |
| `Keyed` | BLAKE2b under a secret that clouds share | whoever holds the secret, at any time |

Why P-256 and not X25519: its group has prime order, so that there is no small subgroup, no
cofactor and no clamping; and a 32-byte x-coordinate that is not on the curve is refused when it is
decoded. X25519 takes any 32 bytes, of which half are on the twist of the curve, and multiplication
keeps that: a party would read off each disguised element one bit of the hash behind it. Only
x-coordinates are sent, which a point shares with its inverse; multiplication respects that.

Formal guarantee of `Commutative` (semi-honest parties, random-oracle model): hashes of distinct
values are independent random group elements, so under the decisional Diffie-Hellman assumption in
P-256 the elements `a H(x)` are indistinguishable from random ones to whoever does not hold `a`
(Agrawal, Evfimievski and Srikant 2003, "Information sharing across private databases", section 3;
ePrint 2019/723). Nothing is claimed against parties that deviate from the protocol.

Edge cases:

| case | what happens |
|---|---|
| a received element is not on the curve, or not 32 bytes | `UserError`, nothing is sent |
| the same value twice in one set | the caller removes it: equal elements would show |
| the point at infinity | has no x-coordinate to send; does not arise in prime order |
| a secret that is a multiple of the group's order | cannot arise: scalars are 1 + s mod (n - 1) |
| a secret of another length | `ValueError` |
| time to hash to the group depends on the value | it is spent at the cloud that knows the value |
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from fedjax_llm.errors import UserError

ELEMENT_BYTES = 32
# 128 bits more than the order of the group has: reduced by it, they are uniform to 2^-128
# (FIPS 186-5, appendix A.2.1).
SECRET_BYTES = 48

_CURVE = ec.SECP256R1()
# SEC 2, section 2.4.2.
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# SEC 1, section 2.3.3: a compressed point with even y. Which of the two y is taken does not matter,
# as only x-coordinates are kept.
_EVEN = b"\x02"


class Blinding(Protocol):
    """One party's disguise for one meeting of two parties."""

    def first(self, values: Sequence[bytes]) -> list[bytes]:
        """Own values as elements of 32 bytes."""
        ...

    def second(self, elements: Sequence[bytes]) -> list[bytes]:
        """The other party's elements with this party's disguise on top, in their order."""
        ...

    def decoy(self, randomness: bytes) -> bytes:
        """An element that nobody can tell from a disguised value, and that matches none."""
        ...


@dataclass(frozen=True)
class Commutative:
    """Diffie-Hellman blinding: `first` is a H(x), `second` is a times the other's element.

    Attributes:
      secret: `SECRET_BYTES` from the operating system, fresh for each meeting: under one secret,
        two meetings could be linked.
      session: Names the meeting; goes into the hash, so that nothing carries over to another.
    """

    secret: bytes = field(repr=False)
    session: bytes
    _key: ec.EllipticCurvePrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Makes the scalar."""
        _check_secret(self.secret)
        scalar = 1 + int.from_bytes(self.secret, "big") % (_ORDER - 1)
        object.__setattr__(self, "_key", ec.derive_private_key(scalar, _CURVE))

    def first(self, values: Sequence[bytes]) -> list[bytes]:
        """The x-coordinates of a H(x); about 70 microseconds a value."""
        return [self._times(hash_to_group(value, self.session)) for value in values]

    def second(self, elements: Sequence[bytes]) -> list[bytes]:
        """The x-coordinates of a times the elements; about 50 microseconds an element.

        Raises:
          UserError: An element that is not an x-coordinate of the curve.
        """
        return [self._times(element) for element in elements]

    def decoy(self, randomness: bytes) -> bytes:
        """A random group element times a."""
        return self._times(hash_to_group(randomness, b"decoy\0" + self.session))

    def _times(self, element: bytes) -> bytes:
        try:
            point = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, _EVEN + element)
        except ValueError:
            raise UserError(
                f"element {element[:4].hex()}... is not on the curve P-256; the other cloud runs "
                "another protocol, or the message was damaged: match again"
            ) from None
        return self._key.exchange(ec.ECDH(), point)


@dataclass(frozen=True)
class Keyed:
    """Keyed hashing: `first` is BLAKE2b of a value under a shared secret, `second` does nothing.

    What leaks: whoever holds the secret can test any guess against every element it has ever seen
    under it; whoever does not sees how many elements there are, and which of two clouds' are equal.

    Attributes:
      secret: `SECRET_BYTES` random bytes that the clouds, and nobody else, hold.
      session: Names the meeting; under another one, equal values have other elements.
    """

    secret: bytes = field(repr=False)
    session: bytes

    def __post_init__(self) -> None:
        """Checks the secret."""
        _check_secret(self.secret)

    def first(self, values: Sequence[bytes]) -> list[bytes]:
        """Keyed hashes; below two microseconds a value."""
        return [self._hash(b"value", value) for value in values]

    def second(self, elements: Sequence[bytes]) -> list[bytes]:
        """The elements as they are; all hold one secret.

        Raises:
          UserError: An element that is not 32 bytes.
        """
        if any(len(element) != ELEMENT_BYTES for element in elements):
            raise UserError(
                f"an element is not {ELEMENT_BYTES} bytes; the other cloud runs another protocol, "
                "or the message was damaged: match again"
            )
        return list(elements)

    def decoy(self, randomness: bytes) -> bytes:
        """A hash of random bytes under a name that no value has."""
        return self._hash(b"decoy", randomness)

    def _hash(self, kind: bytes, value: bytes) -> bytes:
        data = _framed(self.session, value)
        # `person` keeps values and decoys apart, whatever bytes they are.
        return hashlib.blake2b(
            data, digest_size=ELEMENT_BYTES, key=self.secret, person=kind
        ).digest()


def hash_to_group(value: bytes, session: bytes) -> bytes:
    """Hashes a value to the x-coordinate of a point of P-256, 32 bytes.

    By trial and increment (RFC 9380, section 1.1 names the method and its one drawback, that its
    time depends on the value): the first of the SHA-256 hashes of session, value and counter that
    is an x-coordinate. The result is uniform among all of them, and nobody knows its logarithm.
    """
    data = _framed(session, value)
    counter = 0
    while True:
        element = hashlib.sha256(counter.to_bytes(4, "big") + data).digest()
        if _on_curve(element):
            return element
        counter += 1


def _on_curve(element: bytes) -> bool:
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, _EVEN + element)
    except ValueError:
        return False
    return True


def _framed(session: bytes, value: bytes) -> bytes:
    # The length in front keeps two splits of one byte string apart.
    return len(session).to_bytes(4, "big") + session + value


def _check_secret(secret: bytes) -> None:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret must be {SECRET_BYTES} bytes, got {len(secret)}")
