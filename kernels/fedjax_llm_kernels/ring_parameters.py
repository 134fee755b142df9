"""The ring R_q = Z_q[X]/(X^N + 1) of an encrypted sum and how integers are packed into it.

| symbol | name | meaning |
|---|---|---|
| N | `size` | coefficients of a ring element, a power of two |
| q_0 .. q_{L-1} | `primes` | distinct primes below 2^27, each 1 mod 2N; q is their product |
| beta | `digit_bits` | bits of one digit field: holds the sum of all clients' digits |
| k | `digits` | digit fields in a coefficient |
| Delta | 2^`scale_bits` | factor of the message: everything below it is room for the noise |
| | `offset` | added to a value, so that its digit is not negative |
| T | | message of a coefficient: Delta * sum_j digit_j * 2^(beta j) |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

MAX_PRIME_BITS = 27
MAX_LIMBS = 9
MIN_SIZE, MAX_SIZE = 1024, 8192

# Secrets and errors are centred binomials: 96 fair bits, counted, less 48. Variance 96 / 4 = 24.
CBD_ETA = 48


@dataclass(frozen=True)
class Ring:
    """A ring and its packing; hashable, so that it can be a static argument of `jax.jit`.

    Value number e * (k * N) + j * N + i of a message is digit j of coefficient i of ring element
    e: consecutive values lie in consecutive coefficients.

    What the caller has to see to, because it depends on how many clients there are:
      each digit, value + offset, is in [0, 2^beta) for one client and for the sum of all;
      the sum of all errors is below 2^(scale_bits - 1) in magnitude: 48 times the clients is.

    Raises:
      ValueError: A size, prime or packing outside what the arithmetic is proved for.
    """

    size: int
    primes: tuple[int, ...]
    digit_bits: int
    digits: int
    scale_bits: int
    offset: int

    def __post_init__(self) -> None:
        size, primes = self.size, self.primes
        if not MIN_SIZE <= size <= MAX_SIZE or size & (size - 1):
            raise ValueError(f"size must be a power of two in [{MIN_SIZE}, {MAX_SIZE}], got {size}")
        if not 1 <= len(primes) <= MAX_LIMBS or len(set(primes)) != len(primes):
            raise ValueError(f"primes must be 1 to {MAX_LIMBS} distinct primes, got {primes}")
        for prime in primes:
            if prime >> MAX_PRIME_BITS or prime % (2 * size) != 1 or not is_prime(prime):
                raise ValueError(
                    f"{prime} is not a prime below 2^{MAX_PRIME_BITS} that is 1 mod {2 * size}; "
                    "choose_primes gives some"
                )
        if not 1 <= self.digit_bits <= 32 or self.digits < 1 or not 1 <= self.scale_bits <= 26:
            raise ValueError(
                "digit_bits must be in [1, 32], digits at least 1 and scale_bits in [1, 26], got "
                f"{self.digit_bits}, {self.digits}, {self.scale_bits}"
            )
        if not -(1 << 31) <= self.offset < 1 << 31:
            raise ValueError(f"offset must be a 32-bit signed integer, got {self.offset}")
        if self.message_bits >= self.modulus.bit_length():
            raise ValueError(
                f"{self.digits} digits of {self.digit_bits} bits over {self.scale_bits} bits of "
                f"noise need {self.message_bits} bits, and the modulus holds "
                f"{self.modulus.bit_length() - 1}"
            )

    @cached_property
    def modulus(self) -> int:
        """q, the product of the primes."""
        return math.prod(self.primes)

    @property
    def limbs(self) -> int:
        """L, the number of primes."""
        return len(self.primes)

    @property
    def per_element(self) -> int:
        """Values in one ring element."""
        return self.size * self.digits

    @property
    def message_bits(self) -> int:
        """Bits of the largest message: 2^message_bits <= q."""
        return self.scale_bits + self.digit_bits * self.digits

    @property
    def payload_bytes_per_element(self) -> int:
        """Bytes of one ring element on the wire: each residue in as many bits as its prime has."""
        return sum(prime.bit_length() for prime in self.primes) * self.size // 8

    @property
    def lazy_additions(self) -> int:
        """Calls of `ring.add` on a reduced total before it must be reduced: no word passes 2^32.

        A reduced word is below its prime and an added one below 2^bits: 31 for 27-bit primes.
        """
        return min(((1 << 32) - prime) // ((1 << prime.bit_length()) - 1) for prime in self.primes)

    @property
    def lanes(self) -> tuple[int, int]:
        """(A, B) with A * B = N: the transform runs over B blocks of A lanes, then A of B."""
        b = 1 << (self.size.bit_length() - 1) // 2
        return self.size // b, b


def is_prime(number: int) -> bool:
    """Whether a number below 3.3e24 is prime: Miller-Rabin with bases that make it exact there.

    Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", Math. Comp. 2017.

    >>> [n for n in range(30) if is_prime(n)]
    [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2:
        return False
    for base in bases:
        if number % base == 0:
            return number == base
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def choose_primes(size: int, widths: Sequence[int]) -> tuple[int, ...]:
    """Gives the largest distinct primes of the given bit lengths that are 1 mod 2N.

    Args:
      size: N.
      widths: Bit length of each prime, at most 27, in any order; may repeat.

    Returns:
      One prime for each width, in the same order; of two primes of one width the larger is first.

    Raises:
      ValueError: There are not so many primes of a width.

    >>> choose_primes(1024, [27, 26, 27])
    (134215681, 67104769, 134203393)
    """
    found = {width: _primes_of_width(size, width) for width in set(widths)}
    taken = dict.fromkeys(found, 0)
    primes = []
    for width in widths:
        if taken[width] >= len(found[width]):
            raise ValueError(
                f"only {len(found[width])} primes of {width} bits are 1 mod {2 * size}"
            )
        primes.append(found[width][taken[width]])
        taken[width] += 1
    return tuple(primes)


@lru_cache(maxsize=64)
def _primes_of_width(size: int, width: int) -> tuple[int, ...]:
    if not 1 <= width <= MAX_PRIME_BITS:
        raise ValueError(f"a prime must have 1 to {MAX_PRIME_BITS} bits, got {width}")
    low, step = 1 << width - 1, 2 * size
    first = ((1 << width) - 2) // step * step + 1
    found: list[int] = []
    for candidate in range(first, low, -step):
        if is_prime(candidate):
            found.append(candidate)
            if len(found) == MAX_LIMBS:
                break
    return tuple(found)
