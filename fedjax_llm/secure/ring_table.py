"""Which ring the bulk of an encrypted sum takes: few bytes per integer, correct, inside the table.

A client sends, for every ring element, c = a s + e + T modulo q, in Z_q[X] / (X^N + 1): ``a``
public and uniform, ``s`` its secret of this round, ``e`` a fresh error. A coefficient of T carries
k integers: T = 2^delta * sum over j of (x_j + M) 2^(beta j).

| symbol | name | meaning |
|---|---|---|
| M | ``max_abs`` | bound of one integer's absolute value |
| n | ``summands`` | most clients of one sum |
| N | ``ring.size`` | coefficients of a ring element |
| q, L | ``ring.primes`` | product of L primes below 2^27, each 1 modulo 2N |
| beta | ``ring.digit_bits`` | bits of 2 M n: a sum of digits, which never carries into the next |
| k | ``ring.digits`` | integers per coefficient |
| delta | ``ring.scale_bits`` | room for the sum of the errors |
| eta | ``CBD_ETA`` | 48: secrets and errors are the number of ones among 2 eta bits, minus eta |
| C | | coefficients of one round, count / k and some |

**Security.** Secrets and errors have the standard deviation sigma = sqrt(eta / 2) = 4.899. The
server learns the sum of the secrets (that is what the clouds decrypt) and, from it, the sum of the
errors. Given those sums, ring-LWE with sigma is as hard as ring-LWE without them and with
sigma / sqrt(2) = 3.464, provided that two clients of the sum are honest: Hint-RLWE (Kim, Lee, Seo,
Song, Crypto 2023; used for this in ACORN, ePrint 2022/1461, and Willow, ePrint 2024/936). The
theorem is about discrete Gaussians; for centred binomials the secret of one of two honest clients,
given their sum, is hypergeometric around half of it, of the same standard deviation 3.464, and no
attack is known that tells such shapes apart at equal deviation (Kyber rests on the same). The
Homomorphic Encryption Standard's table assumes 3.19, which needs sigma >= 4.52 here: ``TABLE``
is its column for 128 bits against classical attacks and uniform ternary secrets, which are narrower
than ours, and no ring beyond it is ever chosen.

**Noise.** The sum of n errors E is a sum of 2 eta n independent steps of 1/2 up or down: never
beyond eta n, and by Hoeffding P(abs(E) >= x) <= 2 exp(-x^2 / (eta n)). delta is the smallest
number for which 2^(delta - 1) exceeds eta n, or for which the bound at x = 2^(delta - 1), summed
over all C coefficients that hold integers, stays below 2^-40: the failure probability of a round.
``failure_log2`` gives it. A failure is no leak: a digit is off by one, or the canary says so.

**No wrap.** A sum of digits is at most 2 M n < 2^beta, the error is shifted into [0, 2^delta), and
q exceeds 2^(beta k + delta): the sum modulo q is the sum.
"""

import itertools
import math
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm_kernels.ring_parameters import CBD_ETA, MAX_PRIME_BITS, Ring, choose_primes

FAILURE_LOG2 = -40
# Homomorphic Encryption Standard (ePrint 2019/939), table for 128 bits: N -> largest log2 q.
TABLE = {2048: 54, 4096: 109, 8192: 218}
# Sums are handed on as int32.
MAX_DIGIT_BITS = 32
# Narrower primes that are 1 modulo 2N are few.
_MIN_PRIME_BITS = 20
# A larger ring costs more arithmetic per integer and rounds small messages up: it has to save
# this share of the bytes.
_WORTH = 0.08


@dataclass(frozen=True)
class RingParameters:
    """See the table of symbols above.

    Attributes:
        max_abs: M.
        summands: n.
        ring: N, primes, digits.
    """

    max_abs: int
    summands: int
    ring: Ring

    @property
    def per_element(self) -> int:
        """Integers per ring element; one of its places carries the canary."""
        return self.ring.size * self.ring.digits - 1

    @property
    def bits_per_integer(self) -> float:
        """Bits on the wire per integer of a full ring element."""
        return 8 * self.ring.payload_bytes_per_element / self.per_element

    def failure_log2(self, count: int) -> float:
        """log2 of the probability that errors damage a sum of ``count`` integers; -inf: never."""
        elements = -(-count // self.per_element)
        return _failure_log2(self.summands, self.ring.scale_bits, elements * self.ring.size)


def _failure_log2(summands: int, scale_bits: int, coefficients: int) -> float:
    room = 2 ** (scale_bits - 1)
    if room > CBD_ETA * summands:
        return -math.inf
    exponent = room * room / (CBD_ETA * summands) / math.log(2)
    return 1 + math.log2(coefficients) - exponent


def _scale_bits(size: int, digits: int, summands: int, count: int) -> int:
    """delta for the coefficients that ``count`` integers take."""
    coefficients = -(-count // (size * digits - 1)) * size
    return next(
        bits
        for bits in itertools.count(1)
        if _failure_log2(summands, bits, coefficients) <= FAILURE_LOG2
    )


def _ring(size: int, digits: int, max_abs: int, summands: int, scale_bits: int) -> Ring | None:
    """The ring of this size with the fewest bits that holds these digits, if the table has it."""
    digit_bits = (2 * max_abs * summands).bit_length()
    message_bits = digit_bits * digits + scale_bits
    # Primes lie a little below powers of two: one bit more than the message, two at most.
    for width in range(message_bits + 1, TABLE[size] + 1):
        limbs = -(-width // MAX_PRIME_BITS)
        least, more = divmod(width, limbs)
        if least < _MIN_PRIME_BITS:
            continue
        primes = choose_primes(size, [least + 1] * more + [least] * (limbs - more))
        if math.prod(primes) > 2**message_bits:
            return Ring(
                size=size,
                primes=primes,
                digit_bits=digit_bits,
                digits=digits,
                scale_bits=scale_bits,
                offset=max_abs,
            )
    return None


def choose(max_abs: int, summands: int, count: int) -> RingParameters:
    """The ring with the fewest bytes for these integers.

    Args:
        max_abs: bound of one client's integers, absolute.
        summands: most clients of one sum.
        count: integers per message.

    Raises:
        UserError: not positive, or integers too wide for any ring of the table.

    >>> found = choose(2**15 - 1, 8, 1_000_000)
    >>> ring = found.ring
    >>> ring.size, ring.limbs, ring.digits, round(found.failure_log2(10**6), 1)
    (4096, 4, 5, -42.9)
    """
    if max_abs < 1 or summands < 1 or count < 1:
        raise UserError(
            f"an encrypted sum needs max_abs, summands and count of at least 1, got {max_abs}, "
            f"{summands} and {count}"
        )
    digit_bits = (2 * max_abs * summands).bit_length()
    if digit_bits > MAX_DIGIT_BITS:
        raise UserError(
            f"sums of {summands} integers up to {max_abs} take {digit_bits} bits, at most "
            f"{MAX_DIGIT_BITS} are possible; use fewer bits per parameter or fewer clients per sum"
        )
    best: RingParameters | None = None
    for size in TABLE:
        for digits in range(1, TABLE[size] // digit_bits + 1):
            ring = _ring(
                size, digits, max_abs, summands, _scale_bits(size, digits, summands, count)
            )
            if ring is None:
                continue
            found = RingParameters(max_abs, summands, ring)
            if best is None or _bytes(found, count) < (1 - _WORTH * (size > best.ring.size)) * (
                _bytes(best, count)
            ):
                best = found
    assert best is not None  # a digit of 32 bits fits every ring of the table
    return best


def _bytes(found: RingParameters, count: int) -> int:
    return -(-count // found.per_element) * found.ring.payload_bytes_per_element
