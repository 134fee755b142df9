"""How exact and how hidden a sum under CKKS is: its scale, its flooding, its errors.

| symbol | name | meaning |
|---|---|---|
| M | ``max_sum`` | bound of a sum's absolute value, summands times the bound of one integer |
| N | ``RING_DIMENSION`` | 8192; N / 2 complex slots, each two integers: real and imaginary part |
| Q | ``LOG_Q`` | product of a prime of 60 bits and one of 50 |
| d | ``scale_bits`` | the polynomial in a ciphertext is the slots' inverse transform times 2^d |
| f | ``flooding_bits`` | 2^f is the standard deviation of the noise that each cloud adds |
| T | ``parties`` | most clouds that decrypt together |
| n | ``summands`` | most clients of one sum |

Security of the ciphertexts. log Q = 110, where the Homomorphic Encryption Standard's table for 128
bits allows 218 at N = 8192; OpenFHE checks it. The joint secret is discussed in ``parameters``.

Range. A coefficient is at most sqrt(2) M 2^d plus noise: 4 M 2^d <= Q leaves room for both.

Error of a decoded integer, in units of one. Flooding of T clouds has the standard deviation
sqrt(T) 2^f per coefficient; a real or imaginary part adds up N of these, weighted with the
cosines of N angles: sqrt(N / 2) times that, over 2^d. With d >= f + 12 + log2(T) / 2 that is at
most 2^-6. The ciphertexts' own noise is smaller than the flooding by 29 bits and more. Encoding
and decoding in float64 add a standard deviation of at most 2^-48 M (tested; measured, 2^-48.7
for integers that are all M or -M, and less the smaller they are), that is 2^-8 with M <= 2^40,
never seen beyond 2^-47.1 M, hence 2^-7. A sum is refused if any part is a quarter or more from
an integer: 12 standard deviations of flooding and eight times those 2^-7, hence with a
probability of about 2^-107 per integer. For a wrong integer to pass, an error would have to be
above three quarters.

What flooding hides. OpenFHE's threshold CKKS has no ``NOISE_FLOODING_MULTIPARTY``; every partial
decryption gets a discrete Gaussian of standard deviation 2^20, against which the noise E of a
sum stands out: sqrt(N) 2^11 = 2^17.5 in norm for 8 clients and 3 clouds, a statistical distance
up to 2^-3.5. Nothing can be claimed on that. So a cloud draws several of these, by decrypting
zeros, and adds them up with the weights 1, 2^18, 2^36, ...: up to a distance below 2^-400 a
discrete Gaussian again, of a standard deviation of 2^f and more (Peikert, CRYPTO 2010, theorem
3.1: the standard deviation of each is four times the spacing of the lattice that the next one
lives on, which is above its smoothing parameter; OpenFHE's sampler is taken to be exact).
Between it and its translate by E lies a Kullback-Leibler divergence of
|E|^2 / 2^(2 f + 1), so that the statistical distance is at most |E| / 2^(f + 1) (Pinsker):
``noise_distance``, with twice the expected norm for |E|.

What it hides less well. In float64, a client's polynomial differs from the exact inverse
transform of its integers by the rounding of its last bits. The server sees the sum of the
polynomials, hence the sum of these differences, as part of the decrypted sum: up to
sqrt(2) M 2^(d - 48) in norm, which flooding hides to ``rounding_distance``, about
sqrt(T) M 2^-36. It depends on what single clients sent, and on no key. No flooding that leaves
the sum exact can hide it better: both grow with 2^d.
"""

import math
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm.secure.parameters import MAX_PARTIES, MAX_SUMMANDS

RING_DIMENSION = 8192
FIRST_MODULUS_BITS, SCALING_MODULUS_BITS = 60, 50
LOG_Q = FIRST_MODULUS_BITS + SCALING_MODULUS_BITS
MAX_SUM_BITS = 40
# What OpenFHE adds to a partial decryption (its MP_SD), and how draws of it are put together.
BASE_FLOODING_BITS = 20
FLOODING_STEP_BITS, MAX_FLOODING_BITS = 18, 74
ROUNDING_BITS = 48
_ERROR_DEVIATION = 3.19


@dataclass(frozen=True)
class CkksParameters:
    """See the table of symbols above.

    Attributes:
        max_abs: bound of one client's integers, absolute.
        summands: n.
        parties: T.
        scale_bits: d.
        flooding_bits: f.
    """

    max_abs: int
    summands: int
    parties: int
    scale_bits: int
    flooding_bits: int

    # A slot holds one integer each in its real and its imaginary part: no digits to separate.
    digits = 1

    @property
    def radix(self) -> int:
        """Of a number system in which every sum is one digit."""
        return 2 * self.max_abs * self.summands + 1

    @property
    def per_ciphertext(self) -> int:
        """Integers per ciphertext: all but the canary."""
        return RING_DIMENSION - 1

    def ciphertexts(self, count: int) -> int:
        """Ciphertexts that ``count`` integers take."""
        return -(-count // self.per_ciphertext)

    @property
    def ciphertext_bytes(self) -> int:
        """Of one ciphertext on the wire: two ring elements, every residue in its prime's bits.

        The first prime lies below 2^60, the other, OpenFHE's choice for this ring, above 2^50.
        """
        return 2 * (LOG_Q + 1) * RING_DIMENSION // 8

    @property
    def flooding_shifts(self) -> tuple[int, ...]:
        """Every draw of flooding weighs 2^shift times the one before; as many more draws."""
        wanted = self.flooding_bits - BASE_FLOODING_BITS
        steps, rest = divmod(wanted, FLOODING_STEP_BITS)
        return (FLOODING_STEP_BITS,) * steps + ((rest,) if rest else ())

    @property
    def error_deviation(self) -> float:
        """Standard deviation of a decoded integer before it is rounded, by flooding."""
        spread = math.sqrt(self.parties * RING_DIMENSION / 2)
        return spread * 2.0 ** (self.flooding_bits - self.scale_bits)

    @property
    def noise_distance(self) -> float:
        """Statistical distance per ciphertext to which flooding hides what depends on keys.

        Encryption draws a ternary v and Gaussian e_0, e_1, so that E is v e + e_0 + s e_1 summed
        over n clients, with the keys' e and s sums over the clouds.
        """
        products = 2 * RING_DIMENSION * 2 / 3 * self.parties
        deviation = _ERROR_DEVIATION * math.sqrt(self.summands * (products + 1))
        return 2 * math.sqrt(RING_DIMENSION) * deviation / 2.0 ** (self.flooding_bits + 1)

    @property
    def rounding_distance(self) -> float:
        """The same for the rounding of single clients' encodings, which depends on no key."""
        rounded = math.sqrt(2) * self.max_abs * self.summands
        exponent = self.scale_bits - ROUNDING_BITS - self.flooding_bits - 1
        return min(1.0, rounded * 2.0**exponent)


def choose_ckks(max_abs: int, summands: int, parties: int) -> CkksParameters:
    """The widest flooding under which sums come out exact.

    >>> chosen = choose_ckks(max_abs=2**15 - 1, summands=8, parties=3)
    >>> chosen.scale_bits, chosen.flooding_bits, chosen.flooding_shifts
    (87, 74, (18, 18, 18))

    Args:
        max_abs: bound of one client's integers, absolute.
        summands: most clients of one sum.
        parties: number of clouds that hold a key share.

    Raises:
        UserError: a sum may be larger than float64 encodes exactly.
    """
    if max_abs < 1 or not 1 <= summands <= MAX_SUMMANDS or not 2 <= parties <= MAX_PARTIES:
        raise UserError(
            f"an encrypted sum takes max_abs of at least 1, 1 to {MAX_SUMMANDS} summands and 2 to "
            f"{MAX_PARTIES} clouds, got {max_abs}, {summands} and {parties}"
        )
    max_sum = max_abs * summands
    if max_sum > 2**MAX_SUM_BITS:
        raise UserError(
            f"ckks adds up to 2^{MAX_SUM_BITS} exactly, {summands} summands of up to {max_abs} "
            "may be more; use fewer bits per parameter, fewer clients per sum, or mode bfv"
        )
    gap = 12 + math.ceil(math.log2(parties) / 2)
    # The first prime lies a hair below 2^60: a bit is left for that.
    largest_scale = LOG_Q - 1 - 2 - max_sum.bit_length()
    flooding = min(MAX_FLOODING_BITS, largest_scale - gap)
    return CkksParameters(max_abs, summands, parties, flooding + gap, flooding)
