"""Secrets, encryption, addition and unmasking as XLA programs.

Messages are walked element by element in a loop: an element of every limb fits into a core's cache,
a whole message does not.
"""

import jax
import jax.numpy as jnp

from . import bit_planes
from .ring_arithmetic import Machine, at_most_once, barrett, canonical, shoup
from .ring_message import centred_binomial, decode, message_words, residues_to_words
from .ring_parameters import CBD_ETA, Ring
from .ring_tables import Pair, tables
from .ring_transform import forward_transform, inverse_transform


def prepare_secret(
    ring: Ring, random_words: jax.Array, machine: Machine
) -> tuple[jax.Array, jax.Array]:
    """A secret from u32[3, N] random words, and its transform."""
    secret_N = centred_binomial(*random_words).astype(jnp.int32) - CBD_ETA
    return secret_N, transform_secret(ring, secret_N, machine)


def transform_secret(ring: Ring, secret_N: jax.Array, machine: Machine) -> jax.Array:
    """The transform of i32[N], magnitudes below 2^26, as u32[L, N] below the primes."""
    t = tables(ring)
    q = t.q_L[:, None]
    lift = t.lift_L[:, None]  # a multiple of q, at least 2^26: no sum is negative
    x = canonical(
        secret_N.astype(jnp.uint32)[None, :] + lift, q, t.barrett_L[:, None], machine.mulhi
    )
    return at_most_once(forward_transform(ring, x, t.forward, t.q_L, machine), q)


def secret_pair(ring: Ring, secret_hat: jax.Array, machine: Machine) -> Pair:
    """The Shoup pair of secret / N, u32[L, N]: the transform's 1 / N costs nothing this way.

    The companion is floor(w 2^32 / q) - d with 0 <= d < 4, from one product with
    floor(2^(31 + bits) / q); so `shoup` gives less than 2q for every x < 2^30.
    """
    t = tables(ring)
    q = t.q_L[:, None]
    inverse = t.inverse_size_L
    scaled = shoup(secret_hat, inverse.w[:, None], inverse.shoup[:, None], q, machine.mulhi)
    w = at_most_once(scaled, q)
    return Pair(w, machine.mulhi(w << t.shift_L[:, None], t.companion_L[:, None]) << 1)


def masked(ring: Ring, a_hat: jax.Array, secret: Pair, machine: Machine) -> jax.Array:
    """a * s of one element, u32[L, N] in [0, 2q)."""
    t = tables(ring)
    product = shoup(a_hat, secret.w, secret.shoup, t.q_L[:, None], machine.mulhi)
    return inverse_transform(ring, product, t.inverse, t.q_L, machine)


def encrypt(
    ring: Ring,
    values: jax.Array,
    a_hat: jax.Array,
    secret_hat: jax.Array,
    random_words: jax.Array,
    machine: Machine,
) -> jax.Array:
    """u32 words on the wire, see `ring.encrypt`."""
    t = tables(ring)
    q, mulhi = t.q_L[:, None], machine.mulhi
    secret = secret_pair(ring, secret_hat, machine)

    def one(k: jax.Array, payload: jax.Array) -> jax.Array:
        digits = jax.lax.dynamic_slice_in_dim(values, k * ring.per_element, ring.per_element)
        random = jax.lax.dynamic_index_in_dim(random_words, k, axis=1, keepdims=False)
        a_hat_LxN = jax.lax.dynamic_index_in_dim(a_hat, k, keepdims=False)
        words = message_words(ring, list(digits.reshape(ring.digits, ring.size)))
        words[0] = words[0] + centred_binomial(*random)
        words = machine.settle(words)
        # Below 2q + 2^26 + 96 + q + 18 q < 2^32, for at most ten message words.
        x = masked(ring, a_hat_LxN, secret, machine) + words[0][None, :] + (q - CBD_ETA)
        for i, word in enumerate(words[1:], 1):
            w, w_shoup = t.message_LxW.w[:, i, None], t.message_LxW.shoup[:, i, None]
            x = x + shoup(word[None, :], w, w_shoup, q, mulhi)
        x = machine.settle(canonical(x, q, t.barrett_L[:, None], mulhi))
        start = k * words_per_element
        for i, prime in enumerate(ring.primes):
            for plane in bit_planes.pack(x[i].reshape(32, -1), prime.bit_length()):
                payload = jax.lax.dynamic_update_slice_in_dim(payload, plane.reshape(-1), start, 0)
                start = start + plane.size
        return payload

    words_per_element = ring.payload_bytes_per_element // 4
    elements = a_hat.shape[0]
    payload = jnp.zeros(elements * words_per_element, jnp.uint32)
    return jax.lax.fori_loop(0, elements, one, payload)


def add(ring: Ring, total: jax.Array, words: jax.Array) -> jax.Array:
    """Total and the residues of a payload, in place where the total is donated."""
    elements = total.shape[0]
    words = words.reshape(elements, -1)
    zeros = (jnp.int32(0),) * (len(bit_planes.FOLDED) + 1)

    def one(k: jax.Array, folded: jax.Array) -> jax.Array:
        payload = jax.lax.dynamic_index_in_dim(words, k, keepdims=False)
        start = 0
        for i, prime in enumerate(ring.primes):
            bits = prime.bit_length()
            count = ring.size * bits // 32
            residues = bit_planes.unpack_folded(payload[start : start + count], bits)[None, None]
            start += count
            place = (k, jnp.int32(i), *zeros)
            limb = jax.lax.dynamic_slice(folded, place, residues.shape)
            folded = jax.lax.dynamic_update_slice(folded, limb + residues, place)
        return folded

    folded = total.reshape(elements, ring.limbs, *bit_planes.FOLDED, -1)
    return jax.lax.fori_loop(0, elements, one, folded).reshape(total.shape)


def reduce(ring: Ring, total: jax.Array, machine: Machine) -> jax.Array:
    """Each word modulo its prime."""
    t = tables(ring)
    return canonical(total, t.q_L[None, :, None], t.barrett_L[None, :, None], machine.mulhi)


def unmask(
    ring: Ring,
    total: jax.Array,
    a_hat: jax.Array,
    secret_sum_hat: jax.Array,
    clients: jax.Array,
    machine: Machine,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, worst noise and the largest word above the digits, see `ring.unmask`."""
    t = tables(ring)
    q, mulhi = t.q_L[:, None], machine.mulhi
    secret = secret_pair(ring, secret_sum_hat, machine)

    def one(element: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total_LxN, a_hat_LxN = element
        mask = masked(ring, a_hat_LxN, secret, machine)
        x = barrett(total_LxN, q, t.barrett_L[:, None], mulhi) + (2 * q - mask)
        x = at_most_once(at_most_once(x, 2 * q), q) + t.half_L[:, None]
        x = machine.settle(at_most_once(x, q))
        words = residues_to_words(ring, list(x), machine)
        digits, noise, above = decode(ring, words, clients)
        # Maxima of columns: a maximum over all N would be taken one by one.
        return (
            jnp.stack(digits),
            jnp.max(noise.reshape(32, -1), axis=0),
            jnp.max(above.reshape(32, -1), axis=0),
        )

    values, noise, above = jax.lax.map(one, (total, a_hat))
    return values.reshape(-1), jnp.max(noise), jnp.max(above)
