"""Which BFV parameters a sum takes: the smallest upload that is correct and secure.

| symbol | name | meaning |
|---|---|---|
| M | ``max_sum`` | bound of a sum's absolute value, summands times the bound of one integer |
| B, k | ``radix``, ``digits`` | 2M + 1, and the integers per slot (see ``slots``) |
| t | ``plaintext_modulus`` | prime, at least B^k, 1 modulo 2N for slots to exist |
| N | ``ring_dimension`` | slots per ciphertext; the first carries the canary |
| Q | 2^``log_q`` | product of q_0 .. q_{l-1}, ``limb_bits`` each, and two 60-bit primes |
| T | ``parties`` | most clouds that decrypt together |

Security. The Homomorphic Encryption Standard's table for 128 bits against classical attacks
(uniform ternary secrets, error of standard deviation 3.19) allows log Q = 218 at N = 8192 and 438
at N = 16384; OpenFHE checks the same table when it makes the context, and no parameters outside
of it are chosen. The joint secret is the sum of n uniform ternary ones. It is wider than the
table's distribution; an attacker who knows n - 1 shares (the strongest coalition short of all)
faces one uniform ternary secret, which is the table's case, and any weaker attacker faces at
least that.

Correctness. Each partial decryption adds an error uniform in +-Q / (2 q_0) (OpenFHE,
``NOISE_FLOODING_MULTIPARTY``); T of them, the ciphertext's own noise E and an error of decoding
itself must stay below Q / (2t). OpenFHE scales by t / Q in float64 numbers of up to t, and what it
then rounds is off by up to t 2^-51 of one. That leaves a share of 1 - t 2^-50 of Q / (2t) to noise
(measured, to within 0.01: 0.97 at 45 bits, 0.87 at 47, 0.75 at 48, 0.5 at 49), so that
q_0 (1 - t 2^-50) > T t (1 + 2 E q_0 / (T Q)). E is below 2^50, Q / q_0 above 2^119 and, with
t < 2^47, the share above 7/8, where 1 / 1.25 is 4/5: any q_0 a quarter above T t will do.
"""

import math
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm_kernels.ring_parameters import is_prime

# From 48 bits on OpenFHE's decoding is silently wrong under the widest flooding, from 52 bits on
# (51 with some limb sizes) under any (measured, and tested again whenever a context is made).
MAX_PLAINTEXT_BITS = 47
FLOODING_BITS = 120
# Up to these the ciphertext noise E stays below the 2^50 that the flooding argument assumes.
MAX_SUMMANDS, MAX_PARTIES = 2**20, 64
MIN_LIMB_BITS, MAX_LIMB_BITS = 30, 60
HE_STANDARD_128 = {8192: 218, 16384: 438}
_LARGEST_RING = max(HE_STANDARD_128)
_ERROR_BOUND = 3.19 * 6  # what OpenFHE takes the Gaussian error to stay below


@dataclass(frozen=True)
class Parameters:
    """See the table of symbols above."""

    max_abs: int
    summands: int
    parties: int
    radix: int
    digits: int
    plaintext_modulus: int
    limb_bits: int
    message_limbs: int
    ring_dimension: int

    @property
    def limbs(self) -> int:
        """Residues per coefficient: the message's and the two for flooding."""
        return self.message_limbs + 2

    @property
    def log_q(self) -> int:
        """Bits of the ciphertext modulus."""
        return self.message_limbs * self.limb_bits + FLOODING_BITS

    @property
    def per_ciphertext(self) -> int:
        """Integers per ciphertext: all slots but the canary's."""
        return (self.ring_dimension - 1) * self.digits

    def ciphertexts(self, count: int) -> int:
        """Ciphertexts that ``count`` integers take."""
        return -(-count // self.per_ciphertext)

    @property
    def ciphertext_bytes(self) -> int:
        """Of one ciphertext on the wire: two ring elements, every residue in its limb's bits."""
        return 2 * self.log_q * self.ring_dimension // 8

    def _cost(self, count: int | None) -> float:
        if count is None:
            return self.ciphertext_bytes / self.per_ciphertext
        return self.ciphertext_bytes * self.ciphertexts(count)


def _prime_from(least: int, step: int) -> int:
    candidate = least + (1 - least) % step
    while not is_prime(candidate):
        candidate += step
    return candidate


def _noise_bits(modulus: int, summands: int, parties: int) -> int:
    """OpenFHE's own bound on the bits of Q without flooding (its BFV parameter generation)."""
    fresh = _ERROR_BOUND * (1 + 4 * math.sqrt(_LARGEST_RING) * parties)
    return math.ceil(math.log2(modulus * (4 * ((summands + 1) * fresh + summands) + modulus)))


def choose(
    max_abs: int,
    summands: int,
    parties: int,
    count: int | None = None,
    one_ciphertext: bool = False,
) -> Parameters:
    """The parameters with the fewest bytes.

    >>> chosen = choose(max_abs=48, summands=8, parties=3, count=4096)
    >>> chosen.digits, chosen.ring_dimension, chosen.log_q, chosen.ciphertext_bytes
    (1, 8192, 157, 321536)

    Args:
        max_abs: bound of one client's integers, absolute.
        summands: most clients of one sum.
        parties: number of clouds that hold a key share.
        count: integers per client, whose upload is then the smallest; None is so many that only
            the bytes per integer matter.
        one_ciphertext: whether ``count`` integers have to fit one, even where two would be smaller.

    Raises:
        UserError: more summands or clouds than the noise argument covers, or a single sum that
            does not fit a slot of 47 bits, or ``count`` of them one ciphertext.
    """
    if max_abs < 1 or summands < 1 or parties < 2:
        raise UserError(
            f"an encrypted sum needs max_abs and summands of at least 1 and 2 or more parties, "
            f"got {max_abs}, {summands} and {parties}"
        )
    if count is not None and count < 1:
        raise UserError(f"an encrypted sum needs at least 1 integer, got {count}")
    if summands > MAX_SUMMANDS or parties > MAX_PARTIES:
        raise UserError(
            f"an encrypted sum takes up to {MAX_SUMMANDS} summands and {MAX_PARTIES} clouds, got "
            f"{summands} and {parties}"
        )
    radix = 2 * max_abs * summands + 1
    best: Parameters | None = None
    for digits in range(1, MAX_PLAINTEXT_BITS):
        modulus = _prime_from(max(radix**digits, 2 * _LARGEST_RING), 2 * _LARGEST_RING)
        if modulus.bit_length() > MAX_PLAINTEXT_BITS:
            break
        noise = _noise_bits(modulus, summands, parties)
        message_limbs = math.ceil(noise / MAX_LIMB_BITS)
        # A prime of b bits that is 1 modulo 2N lies a hair below 2^b: 1.3 leaves the quarter.
        flooded = math.ceil(math.log2(1.3 * parties * modulus))
        limb_bits = max(math.ceil(noise / message_limbs), flooded, MIN_LIMB_BITS)
        if limb_bits > MAX_LIMB_BITS:
            break
        log_q = message_limbs * limb_bits + FLOODING_BITS
        ring = min(n for n, allowed in HE_STANDARD_128.items() if log_q <= allowed)
        found = Parameters(
            max_abs, summands, parties, radix, digits, modulus, limb_bits, message_limbs, ring
        )
        if one_ciphertext and count is not None and found.ciphertexts(count) > 1:
            continue
        if best is None or found._cost(count) < best._cost(count):
            best = found
    if best is None:
        where = f" to fit {count} of them into one ciphertext" if one_ciphertext else ""
        raise UserError(
            f"sums of {summands} integers up to {max_abs} need more than {MAX_PLAINTEXT_BITS} bits"
            f"{where}; use fewer bits per parameter or fewer clients per sum"
        )
    return best
