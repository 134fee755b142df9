"""The sum of per-example gradients, each clipped, in as few passes over them as there can be.

Clipping one by one and then adding reads E gradients to find their largest magnitudes, again for
their norms, again to shorten and to add, and may write the shortened ones in between. Nothing but
the sum is wanted. The XLA form measures all examples and then adds what it shortens while reading,
in three passes; the Pallas forms find magnitude and norm in one, so that two are left, or one where
an example fits into a TPU core's fast memory.

Letters: E examples, P elements of an array.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from . import choice
from .clip_norm import measured, shorten
from .pallas_forms import Implementation, by_platform

# Examples that one pass over the sum adds. XLA makes one loop of additions that are written out; of
# a sum over an axis it makes, on a CPU, an array of all that is shortened, and a pass over that.
_TOGETHER = 8


def clip_sum(
    arrays_E: Sequence[jax.Array],
    counts_E: jax.Array,
    bound: float | jax.Array,
    implementation: Implementation | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Sums over examples of arrays shortened to an l2 norm of at most `bound`, over all together.

    Formal guarantee: each example that counts adds to the sum arrays of norm at most `bound`, as a
    real number, that depend on no other example; one that does not count adds exactly zero. So one
    example more or fewer moves the sum by at most `bound`, up to the float32 rounding of the
    additions. The norm is float32 and distrusted by the factor `clip_norm.MARGIN`, which exceeds
    its worst-case rounding error in each form (`clip_norm`, `clip_sum_pallas`); what is added is
    `clip_norm.clip_arrays` of the example, or, where a compiler fuses the product with the
    addition, the same before its last rounding.

    | an example                             | adds                   | norm reported |
    |----------------------------------------|------------------------|---------------|
    | does not count, whatever it holds      | zeros                  | as below      |
    | all zeros                              | zeros                  | 0             |
    | norm (with margin) <= bound            | itself                 | the norm      |
    | finite, however large                  | itself, scaled to bound| the norm, inf above 3.4e38 |
    | any array holds NaN or inf             | zeros                  | inf           |
    | all magnitudes below 1.2e-38 (denormal)| zeros                  | 0             |

    | case                                   | result                                 |
    |----------------------------------------|----------------------------------------|
    | bound is inf                           | a plain sum of what is finite          |
    | bound below 2^-96 = 1.3e-29, or NaN    | zeros                                  |
    | no examples                            | zeros, no norms                        |
    | no arrays, or no elements              | zeros, norms of 0                      |

    Args:
        arrays_E: float32 [E, ...]: the leaves of a pytree of per-example gradients.
        counts_E: bool [E].
        bound: [] float32, in the unit of the arrays.
        implementation: "xla", "pallas", or None for what `choice` names for the device kind. The
            forms add in different orders: they agree up to rounding, not bit for bit.

    Returns:
        The sums, [...] each, and the norms before clipping, float32 [E]. The norms are those of
        single examples, not noised: they must not leave the data holder.

    Raises:
        ValueError: an array is not float32 or not of E entries; the implementation is none.
    """
    examples = counts_E.shape[0]
    for number, array in enumerate(arrays_E):
        if array.dtype != jnp.float32 or array.shape[:1] != (examples,):
            raise ValueError(
                f"array {number} must be float32 with {examples} entries, as counts_E has, got "
                f"{array.dtype} {array.shape}; cast gradients, and stack one for each example"
            )
    places = [place for place, array in enumerate(arrays_E) if array.size]
    sums = [jnp.zeros(array.shape[1:], jnp.float32) for array in arrays_E]
    if not places:
        return sums, jnp.zeros((examples,), jnp.float32)
    full_E = [arrays_E[place].reshape(examples, -1) for place in places]
    bound = jnp.asarray(bound, jnp.float32)
    if choice.of("clip_sum", implementation) == "pallas":
        from .clip_sum_pallas import gpu_clip_sum, tpu_clip_sum

        found, norm_E = by_platform(tpu_clip_sum, gpu_clip_sum, full_E, counts_E, bound)
    else:
        found, norm_E = _xla(full_E, counts_E, bound)
    for place, summed_P in zip(places, found, strict=True):
        sums[place] = summed_P.reshape(sums[place].shape)
    return sums, norm_E


def _xla(
    arrays_ExP: list[jax.Array], counts_E: jax.Array, bound: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    how_E, norm_E = jax.vmap(lambda arrays: measured(arrays, bound))(arrays_ExP)

    def total(array_ExP: jax.Array) -> jax.Array:
        def one(example: int | jax.Array) -> jax.Array:
            how = jax.tree.map(lambda leaf: leaf[example], how_E)
            shortened_P = shorten(array_ExP[example], how)
            return jnp.where(counts_E[example], shortened_P, jnp.float32(0))

        def some(first: int | jax.Array, count: int) -> jax.Array:
            return functools.reduce(jnp.add, [one(first + place) for place in range(count)])

        groups, rest = divmod(counts_E.shape[0], _TOGETHER)
        summed_P = some(groups * _TOGETHER, rest) if rest else jnp.zeros(array_ExP.shape[1:])
        if not groups:
            return summed_P
        found: jax.Array = jax.lax.fori_loop(
            0, groups, lambda group, sum_P: sum_P + some(group * _TOGETHER, _TOGETHER), summed_P
        )
        return found

    return [total(array_ExP) for array_ExP in arrays_ExP], norm_E
