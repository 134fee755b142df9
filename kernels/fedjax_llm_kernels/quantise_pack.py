"""Stochastic rounding to few bits, and the numbers as one stream of bits, in one pass.

Apart, the two write an int32 for each float32 and read it again, to make b bits of it. Here a
vector and its random bits are read and b / 32 words a number are written. The integers are those of
`fedjax_llm.compression.rounding.quantise`, the stream is that of `fedjax_llm.compression.packing`:
a number n travels as n + m, m = 2^(b-1) - 1, in b bits, the highest first, one after the other;
zeros fill the last word. 32 numbers are b whole words, which is what all forms count in.

Letters: M numbers, G groups of 32 numbers, b bits of a number.
"""

from functools import partial

import jax
import jax.numpy as jnp

from . import choice
from .pallas_forms import Implementation, by_platform
from .stochastic_fields import GROUP, fields, filled, word_of

FEWEST_BITS, MOST_BITS = 2, 16


def quantise_pack(
    y_M: jax.Array,
    random_M: jax.Array,
    step: float | jax.Array,
    bits: int,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rounds each number to one of the two neighbouring multiples of the step, and packs them.

    Formal guarantee: for the same numbers and random bits every form gives the same words, bit for
    bit. With uniform independent random bits and exact products with 1 / step (float32's are off by
    a relative 2^-23), inside of the range m * step the mean of step * n is y to within 2^-32 step,
    the two neighbours alone come up, and numbers of the result are independent.

    | y | number packed | counted as invalid |
    |---|---|---|
    | 0, -0, a multiple of the step | that multiple, always | no |
    | beyond m * step, finite | m or -m: shortened, and biased | no |
    | NaN, infinite | 0 | yes: the words must not be sent unless the count is 0 |

    Args:
      y_M: float32.
      random_M: uint32, uniform bits of this client's, round's and stage's own.
      step: Above 0; what one integer stands for.
      bits: b, a static Python integer in [2, 16].
      implementation: "xla", "pallas", or None for what `choice` names for the device kind.

    Returns:
      words: uint32 [b * ceil(M / 32)], the first bit of the stream the highest of the first word:
        the words in big-endian order, cut to ceil(M b / 8) bytes, are the payload.
      invalid: int32 [], how many numbers were not finite.

    Raises:
      ValueError: `bits` is out of range, or shapes or dtypes do not fit.

    >>> words, invalid = quantise_pack(jnp.float32([1.0, -7.0]), jnp.zeros(2, jnp.uint32), 1.0, 4)
    >>> hex(words[0]), int(invalid)  # 1 + 7 and -7 + 7, then zeros
    ('0x80000000', 0)
    """
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits must be in [{FEWEST_BITS}, {MOST_BITS}], got {bits}; 8 is common")
    if y_M.ndim != 1 or y_M.dtype != jnp.float32:
        raise ValueError(f"y must be float32 [M], got {y_M.dtype} {y_M.shape}; flatten and cast it")
    if random_M.shape != y_M.shape or random_M.dtype != jnp.uint32:
        raise ValueError(
            f"random bits must be uint32 {y_M.shape}, got {random_M.dtype} {random_M.shape}; "
            "draw one word for each number"
        )
    if not y_M.size:
        return jnp.zeros((0,), jnp.uint32), jnp.int32(0)
    inverse = 1 / jnp.asarray(step, jnp.float32)
    arguments = (y_M, random_M, inverse)
    if choice.of("quantise_pack", implementation) == "pallas":
        from .quantise_pack_pallas import gpu_pack, tpu_pack

        words, invalid = by_platform(
            partial(tpu_pack, bits=bits), partial(gpu_pack, bits=bits), *arguments
        )
        return words, invalid
    return _xla(*arguments, bits)


def _xla(
    y_M: jax.Array, random_M: jax.Array, inverse: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    field_M, invalid_M = fields(y_M, random_M, inverse, bits)
    # Without the barrier XLA on a CPU computes fields again for every word that they go into, which
    # takes five times as long; 16 bits hold every field.
    field_M = jax.lax.optimization_barrier(field_M.astype(jnp.uint16)).astype(jnp.int32)
    field_GxI = filled(field_M, GROUP).reshape(-1, GROUP)
    words = [word_of(lambda place: field_GxI[:, place], word, bits) for word in range(bits)]
    packed = jnp.stack(words, axis=1).reshape(-1)
    packed_words: jax.Array = jax.lax.bitcast_convert_type(packed, jnp.uint32)
    return packed_words, jnp.sum(invalid_M, dtype=jnp.int32)
