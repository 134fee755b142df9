"""Encryption, addition and unmasking as Pallas kernels, one program for each block of work.

The same arithmetic and the same results as `ring_xla`, bit for bit. Elements lie in the second
last axis, eight to a block (the sublanes of a TPU), the last axis holds 32 to 128 lanes, and every
butterfly, plane of bits and digit is whole slices of the first axis:

| array | shape in a kernel | from |
|---|---|---|
| coefficients | [A, 8, B] | a row of B for each a |
| transform domain | [B, 8, A] | the order of `ring_tables` |
| words on the wire | [A * bits / 32, 8, B] for each limb | `bit_planes`, row by row |

The transposition between the two halves of a transform, [B, 8, A] to [A, 8, B], is the only
movement across lanes. The layouts are made around the kernels by XLA.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import bit_planes
from .ring_arithmetic import ACCELERATOR, Words, at_most_once, barrett, canonical, shoup
from .ring_message import centred_binomial, decode, message_words, residues_to_words
from .ring_parameters import CBD_ETA, Ring
from .ring_tables import Pair, tables
from .ring_xla import secret_pair

BLOCK = 8
_mulhi = ACCELERATOR.mulhi


def encrypt(
    ring: Ring,
    values: jax.Array,
    a_hat: jax.Array,
    secret_hat: jax.Array,
    random_words: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """u32 words on the wire, see `ring.encrypt`."""
    elements = a_hat.shape[0]
    a, b = ring.lanes
    values = _blocks(values.reshape(elements, ring.digits, a, b), (1, 2, 0, 3))
    random = _blocks(jnp.swapaxes(random_words, 0, 1).reshape(elements, 3, a, b), (1, 2, 0, 3))
    a_hat = _blocks(a_hat.reshape(elements, ring.limbs, b, a), (1, 2, 0, 3))
    rows = sum(prime.bit_length() for prime in ring.primes) * a // 32
    payload = _call(
        partial(_encrypt_kernel, ring),
        [values, random, a_hat],
        [*_secret(ring, secret_hat), *_twiddles(ring)],
        [((rows,), b, jnp.uint32)],
        interpret,
    )[0]
    return jnp.swapaxes(payload, 0, 1)[:elements].reshape(-1)


def _encrypt_kernel(ring: Ring, *refs: Any) -> None:
    values, random, a_hat, secret_w, secret_shoup, *twiddles, payload = refs
    t = tables(ring)
    words = message_words(ring, [values[j] for j in range(ring.digits)])
    words[0] = words[0] + centred_binomial(random[0], random[1], random[2])
    start = 0
    for i, prime in enumerate(ring.primes):
        q = jnp.uint32(prime)
        secret = Pair(secret_w[i], secret_shoup[i])
        x = _masked(ring, i, a_hat[i], secret, twiddles) + words[0] + (q - CBD_ETA)
        for j, word in enumerate(words[1:], 1):
            w, w_shoup = t.message_LxW.w[i, j], t.message_LxW.shoup[i, j]
            x = x + shoup(word, jnp.uint32(w), jnp.uint32(w_shoup), q, _mulhi)
        x = canonical(x, q, jnp.uint32(t.barrett_L[i]), _mulhi)
        for plane in bit_planes.pack(x, prime.bit_length()):
            payload[start : start + plane.shape[0]] = plane
            start += plane.shape[0]


def add(ring: Ring, total: jax.Array, words: jax.Array, *, interpret: bool) -> jax.Array:
    """Total and the residues of a payload."""
    elements = total.shape[0]
    a, b = ring.lanes
    total = _blocks(total.reshape(elements, ring.limbs, a, b), (1, 2, 0, 3))
    words = _blocks(words.reshape(elements, -1, b), (1, 0, 2))
    added = _call(
        partial(_add_kernel, ring),
        [total, words],
        [],
        [((ring.limbs, a), b, jnp.uint32)],
        interpret,
    )[0]
    return jnp.transpose(added, (2, 0, 1, 3))[:elements].reshape(elements, ring.limbs, ring.size)


def _add_kernel(ring: Ring, total: Any, words: Any, out: Any) -> None:
    start = 0
    for i, prime in enumerate(ring.primes):
        rows = ring.lanes[0] * prime.bit_length() // 32
        limb = words[start : start + rows]
        out[i] = total[i] + bit_planes.unpack(limb, prime.bit_length())
        start += rows


def unmask(
    ring: Ring,
    total: jax.Array,
    a_hat: jax.Array,
    secret_sum_hat: jax.Array,
    clients: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, worst noise and the largest word above the digits, see `ring.unmask`."""
    elements = a_hat.shape[0]
    a, b = ring.lanes
    total = _blocks(total.reshape(elements, ring.limbs, a, b), (1, 2, 0, 3))
    a_hat = _blocks(a_hat.reshape(elements, ring.limbs, b, a), (1, 2, 0, 3))
    values, noise, above = _call(
        partial(_unmask_kernel, ring),
        [total, a_hat],
        [clients.reshape(1, 1, 1), *_secret(ring, secret_sum_hat), *_twiddles(ring)],
        [
            ((ring.digits, a), b, jnp.int32),
            ((1,), b, jnp.int32),
            ((1,), b, jnp.uint32),
        ],
        interpret,
    )
    values = jnp.transpose(values, (2, 0, 1, 3))[:elements].reshape(-1)
    # The elements that fill the last block hold zeros, not a message: they do not count.
    return values, jnp.max(noise[0, :elements]), jnp.max(above[0, :elements])


def _unmask_kernel(ring: Ring, *refs: Any) -> None:
    total, a_hat, clients, secret_w, secret_shoup, *twiddles, values, noise, above = refs
    t = tables(ring)
    residues = []
    for i, prime in enumerate(ring.primes):
        q = jnp.uint32(prime)
        mask = _masked(ring, i, a_hat[i], Pair(secret_w[i], secret_shoup[i]), twiddles)
        x = barrett(total[i], q, jnp.uint32(t.barrett_L[i]), _mulhi) + (2 * q - mask)
        x = at_most_once(at_most_once(x, 2 * q), q) + jnp.uint32(t.half_L[i])
        residues.append(at_most_once(x, q))
    words = residues_to_words(ring, residues, ACCELERATOR)
    digits, magnitude, over = decode(ring, words, clients[...])
    for j, digit in enumerate(digits):
        values[j] = digit
    noise[...] = jnp.max(magnitude, axis=0, keepdims=True)
    while over.shape[0] > 1:  # no unsigned maximum along an axis on a TPU
        half = over.shape[0] // 2
        over = jnp.maximum(over[:half], over[half:])
    above[...] = over


def _masked(ring: Ring, limb: int, a_hat: jax.Array, secret: Pair, twiddles: Any) -> jax.Array:
    """a * s of eight elements and one limb: [B, 8, A] to [A, 8, B], in [0, 2q)."""
    q = jnp.uint32(ring.primes[limb])
    lanes_w, lanes_shoup, rows_w, rows_shoup = (table[limb] for table in twiddles)
    x = shoup(a_hat, secret.w, secret.shoup, q, _mulhi)
    x = _inverse_half(x, Pair(lanes_w, lanes_shoup), q)
    x = jnp.transpose(x, (2, 1, 0))
    return _inverse_half(x, Pair(rows_w, rows_shoup), q)


def _inverse_half(x: jax.Array, twiddles: Pair, q: Words) -> jax.Array:
    """The levels over the first axis, as in `ring_transform`."""
    rows, *rest = x.shape
    m = rows // 2
    while m:
        blocks = x.reshape(m, 2, rows // (2 * m), *rest)
        upper, lower = blocks[:, 0], blocks[:, 1]
        w, w_shoup = twiddles.w[m : 2 * m][:, None], twiddles.shoup[m : 2 * m][:, None]
        difference = shoup(upper + (2 * q - lower), w, w_shoup, q, _mulhi)
        x = jnp.stack([at_most_once(upper + lower, 2 * q), difference], axis=1).reshape(x.shape)
        m //= 2
    return x


def _secret(ring: Ring, secret_hat: jax.Array) -> list[jax.Array]:
    a, b = ring.lanes
    pair = secret_pair(ring, secret_hat, ACCELERATOR)
    return [x.reshape(ring.limbs, b, 1, a) for x in (pair.w, pair.shoup)]


def _twiddles(ring: Ring) -> list[Words]:
    inverse = tables(ring).inverse
    lanes, rows = inverse.lanes_LxBxA, inverse.rows_LxA
    return [
        *(x[:, :, None, :] for x in (lanes.w, lanes.shoup)),
        *(x[:, :, None, None] for x in (rows.w, rows.shoup)),
    ]


def _blocks(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Elements from the first axis to the second last, filled up to whole blocks."""
    fill = -x.shape[0] % BLOCK
    x = jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1))
    return jnp.transpose(x, axes)


def _call(
    kernel: Any,
    blocked: list[jax.Array],
    whole: list[Any],
    outputs: list[tuple[tuple[int, ...], int, Any]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel once for each block of eight elements."""
    elements = blocked[0].shape[-2]

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        lead = len(shape) - 2
        return pl.BlockSpec(
            (*shape[:-2], BLOCK, shape[-1]), lambda g, lead=lead: (0,) * lead + (g, 0)
        )

    def all_of(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda g, rank=len(shape): (0,) * rank)

    shapes = [(*lead, elements, lanes) for lead, lanes, _ in outputs]
    return pl.pallas_call(
        kernel,
        grid=(elements // BLOCK,),
        in_specs=[*(block(x.shape) for x in blocked), *(all_of(x.shape) for x in whole)],
        out_specs=[block(shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, (_, _, dtype) in zip(shapes, outputs, strict=True)
        ],
        interpret=interpret,
    )(*blocked, *whole)
