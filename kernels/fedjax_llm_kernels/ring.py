"""Ring-LWE encryption of integer vectors whose ciphertexts add: c = a * s + e + T in R_q.

The bulk layer of the encrypted sum. `secure/` draws the secrets and the noise from the operating
system, encrypts the short secrets under a threshold key and answers for the noise budget (see
`Ring` for what that is). Here is the arithmetic, and nothing that is secret outlives a call.

All arithmetic is in 32-bit words. Elements, limbs and coefficients are K, L and N; the transform
domain's order is `ring_tables`', the wire format is `bit_planes`'. `implementation` is "xla",
"pallas", or None for the one that measured best on the platform: XLA's, as yet, everywhere; on a
CPU the Pallas kernels are interpreted, for tests.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from . import ring_uniform, ring_xla
from .ring_arithmetic import ACCELERATOR, CPU, Machine
from .ring_parameters import Ring as Ring
from .ring_parameters import choose_primes as choose_primes
from .ring_uniform import uniform_host as uniform_host

Implementation = Literal["xla", "pallas"] | None
# What jit takes from numpy it need not copy first.
HostOrDevice = jax.Array | NDArray[Any]

__all__ = [
    "Ring",
    "add",
    "add_words",
    "choose_primes",
    "encrypt",
    "encrypt_words",
    "prepare_secret",
    "reduce",
    "transform_secret",
    "uniform",
    "uniform_host",
    "unmask",
]


@partial(jax.jit, static_argnums=0)
def prepare_secret(ring: Ring, random_words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes a fresh secret of N coefficients from secret random bits.

    Formal guarantee. For uniform independent bits the coefficients are independent centred
    binomials with eta = 48: variance 24, standard deviation 4.899, magnitude at most 48. The map
    from bits to secret has no branch and no lookup.

    Args:
      ring: The ring.
      random_words: u32[3, N] from a cryptographic generator, used for nothing else.

    Returns:
      The secret, i32[N], and its transform, u32[L, N] below the primes.
    """
    return _by_platform(partial(ring_xla.prepare_secret, ring), random_words)


@partial(jax.jit, static_argnums=0)
def transform_secret(ring: Ring, secret_N: jax.Array) -> jax.Array:
    """The transform of a secret or a sum of secrets: i32[N], |s| < 2^26, to u32[L, N]."""
    return _by_platform(partial(ring_xla.transform_secret, ring), secret_N)


def uniform(ring: Ring, key_words: jax.Array, first_element: int, elements: int) -> jax.Array:
    """Expands public polynomials on the device; `ring_uniform` has the definition and its bias.

    Args:
      ring: The ring.
      key_words: u32[8], a public ChaCha20 key as little-endian words.
      first_element: Number of the first element.
      elements: K.

    Returns:
      a_hat, u32[K, L, N] below the primes, in the transform domain.

    Raises:
      ValueError: The elements are not within ChaCha20's 2^32 blocks.
    """
    ring_uniform.check_blocks(ring, first_element, elements)
    return _uniform(ring, key_words, jnp.uint32(first_element), elements)


@partial(jax.jit, static_argnums=(0, 3))
def _uniform(ring: Ring, key_words: jax.Array, first: jax.Array, elements: int) -> jax.Array:
    def run(key_words: jax.Array, first: jax.Array, machine: Machine) -> jax.Array:
        return ring_uniform.uniform_device(ring, key_words, first, elements, machine.mulhi)

    return _by_platform(run, key_words, first)


def encrypt(
    ring: Ring,
    values: HostOrDevice,
    a_hat: HostOrDevice,
    secret_hat: jax.Array,
    random_words: HostOrDevice,
    implementation: Implementation = None,
) -> NDArray[np.uint8]:
    """Encrypts K elements of values and brings them to the host as bytes on the wire.

    Formal guarantee. The payload is a * s + e + T with e a fresh centred binomial (eta = 48) made
    from `random_words` by a map without branches or lookups. It hides the values, under decision
    ring-LWE with these secrets and errors, if s was made by `prepare_secret`, no (s, a) pair is
    used twice and no bit of `random_words` is used for anything else. It proves nothing about who
    wrote it.

    | case | result |
    |---|---|
    | a value outside [-offset, 2^beta - offset) | runs into its neighbours: check before |
    | `a_hat` not below the primes | a wrong payload if a word is above 2^30, else the right one |

    Args:
      ring: The ring.
      values: i32[K * ring.per_element], in the order that `Ring` gives.
      a_hat: u32[K, L, N] from `uniform` or `uniform_host`.
      secret_hat: u32[L, N] from `prepare_secret`.
      random_words: u32[3, K, N] from a cryptographic generator.
      implementation: See the module.

    Returns:
      u8[K * ring.payload_bytes_per_element].

    Raises:
      ValueError: A shape is wrong.
    """
    elements = a_hat.shape[0]
    _check("values", values.shape, (elements * ring.per_element,))
    _check("a_hat", a_hat.shape, (elements, ring.limbs, ring.size))
    _check("secret_hat", secret_hat.shape, (ring.limbs, ring.size))
    _check("random_words", random_words.shape, (3, elements, ring.size))
    words = encrypt_words(ring, values, a_hat, secret_hat, random_words, implementation)
    return np.asarray(words).astype("<u4", copy=False).view(np.uint8)


@partial(jax.jit, static_argnums=(0, 5))
def encrypt_words(
    ring: Ring,
    values: HostOrDevice,
    a_hat: HostOrDevice,
    secret_hat: jax.Array,
    random_words: HostOrDevice,
    implementation: Implementation = None,
) -> jax.Array:
    """`encrypt` on the device, to u32 words: their little-endian bytes go on the wire."""
    arguments = (values, a_hat, secret_hat, random_words)
    if implementation == "pallas":
        from . import ring_pallas

        return _pallas(partial(ring_pallas.encrypt, ring), *arguments)
    return _by_platform(partial(ring_xla.encrypt, ring), *arguments)


def add(
    ring: Ring, total: jax.Array, payload: Any, implementation: Implementation = None
) -> jax.Array:
    """Adds a payload to a total.

    Reduction is lazy: after `ring.lazy_additions` calls on a reduced (or zero) total, `reduce` must
    come before the next one, or a word may pass 2^32 and be lost.

    Args:
      ring: The ring.
      total: u32[K, L, N]; donated: it must not be used afterwards.
      payload: K * ring.payload_bytes_per_element bytes, anything with a buffer. Any bits are valid.
      implementation: See the module.

    Returns:
      u32[K, L, N].

    Raises:
      ValueError: The payload's length or the total's shape is wrong.
    """
    _check("total", total.shape[1:], (ring.limbs, ring.size))
    words = np.frombuffer(payload, "<u4")
    _check("payload", (words.nbytes,), (total.shape[0] * ring.payload_bytes_per_element,))
    return add_words(ring, total, words, implementation)


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
def add_words(
    ring: Ring, total: jax.Array, words: jax.Array, implementation: Implementation = None
) -> jax.Array:
    """`add` of a payload in u32 words; the total is donated."""
    if implementation == "pallas":
        from . import ring_pallas

        return _pallas(partial(ring_pallas.add, ring), total, words)
    return ring_xla.add(ring, total, words)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def reduce(ring: Ring, total: jax.Array) -> jax.Array:
    """Each word of u32[K, L, N] modulo its prime; the total is donated."""
    return _by_platform(partial(ring_xla.reduce, ring), total)


@partial(jax.jit, static_argnums=(0, 5))
def unmask(
    ring: Ring,
    total: jax.Array,
    a_hat: jax.Array,
    secret_sum_hat: jax.Array,
    clients: jax.Array,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decrypts a sum under the sum of the secrets.

    Exact if each sum of digits is in [0, 2^beta) and each sum of errors is below
    2^(scale_bits - 1) in magnitude.

    | case | result |
    |---|---|
    | other secrets than the payloads' | noise fills its field, words above are not 0: refuse |
    | a damaged payload | as above with several limbs, perhaps unnoticed with one: a MAC's work |
    | a sum of digits passes 2^beta | runs into its neighbour: excluded by the caller's parameters |
    | `clients` is wrong | every value is off by a multiple of the offset; nothing here notices |

    Args:
      ring: The ring.
      total: u32[K, L, N], any words.
      a_hat: u32[K, L, N], as for `encrypt`.
      secret_sum_hat: u32[L, N], `transform_secret` of the sum of the secrets.
      clients: i32 scalar, the number of payloads in the total.
      implementation: See the module.

    Returns:
      The sums, i32[K * ring.per_element]; the largest magnitude of the noise, i32, at most
      2^(scale_bits - 1); the largest word above the top digit, u32, which must be 0.
    """
    arguments = (total, a_hat, secret_sum_hat, clients)
    if implementation == "pallas":
        from . import ring_pallas

        return _pallas(partial(ring_pallas.unmask, ring), *arguments)
    return _by_platform(partial(ring_xla.unmask, ring), *arguments)


def _by_platform(function: Callable[..., Any], *arguments: HostOrDevice) -> Any:
    return jax.lax.platform_dependent(
        *arguments,
        cpu=partial(function, machine=CPU),
        default=partial(function, machine=ACCELERATOR),
    )


def _pallas(function: Callable[..., Any], *arguments: HostOrDevice) -> Any:
    return jax.lax.platform_dependent(
        *arguments,
        cpu=partial(function, interpret=True),
        default=partial(function, interpret=False),
    )


def _check(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise ValueError(f"{name} must have shape {wanted} for this ring, got {got}")
