"""Which examples a step uses: exact Poisson samples, and shuffled batches for runs without privacy.

Letters: N the padded number of examples, S steps, B examples per batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError


def float32_rate(rate: float) -> float:
    """The largest float32 that does not exceed a rate: what the sampler can be handed exactly."""
    nearest = np.float32(rate)
    return float(nearest if float(nearest) <= rate else np.nextafter(nearest, np.float32(-np.inf)))


def poisson_sample(
    key: jax.Array,
    population: jax.Array | int,
    rate: jax.Array | float,
    size: int,
    due_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Includes each of the first `population` entries, independently, with probability `rate`.

    Formal guarantee: given uniform 32-bit words, entry i is included with probability
    floor(rate * 2^32) / 2^32, which is never above the float32 `rate` and within 2^-32 of it, and
    with probability one when rate >= 1; inclusions are independent. A comparison of float32
    uniforms, which have 23 bits, would overshoot a rate of 1e-5 by a percent. The size of the
    sample is random and unbounded but for `population`: nothing is truncated.
    The word that decides on entry i depends on `key` and i, not on `population`.

    | input              | result                     |
    |--------------------|----------------------------|
    | rate <= 0 or NaN   | nothing is selected        |
    | rate >= 1          | all of the population      |
    | population 0       | nothing is selected        |
    | population > size  | the first `size` are sampled from; a defect of the caller |

    Args:
        key: a JAX key that is used for nothing else.
        population: [] int32, may be traced; arrays of clients are padded to a common `size`.
        rate: [] float32, may be traced.
        size: N, the length of the padded arrays.
        due_N: bool, of which entries one may be taken, by what is known of each alone; of all if
            None.

    Returns:
        indices_N (int32; the selected entries in ascending order, then zeros) and the number of
        selected entries ([] int32).
    """
    words_N = jax.random.bits(key, (size,), jnp.uint32)
    rate = jnp.asarray(rate, jnp.float32)
    inside = (rate > 0) & (rate < 1)
    # Times a power of two is exact, and so is the conversion of a float32 below 2^32.
    threshold = (jnp.where(inside, rate, jnp.float32(0)) * jnp.float32(2.0**32)).astype(jnp.uint32)
    present_N = jnp.arange(size, dtype=jnp.int32) < jnp.asarray(population, jnp.int32)
    if due_N is not None:
        present_N &= due_N
    selected_N = ((words_N < threshold) | (rate >= 1)) & present_N
    (indices_N,) = jnp.nonzero(selected_N, size=size, fill_value=0)
    return indices_N.astype(jnp.int32), selected_N.sum(dtype=jnp.int32)


def uniform_batches(
    key: jax.Array,
    population: jax.Array | int,
    size: int,
    steps: int,
    batch: int,
    own: jax.Array | None = None,
) -> jax.Array:
    """Fixed-size batches that walk through one shuffle of the data. For unit "none" only.

    Fixed-size batches cannot be accounted as Poisson samples; `PrivacyPlan` refuses them.
    Over the S * B draws, any two entries of the population are used equally often up to one.

    Args:
        key: a JAX key that is used for nothing else.
        population: [] int32, at least one; may be traced.
        size: N, the length of the padded arrays.
        steps: S.
        batch: B.
        own: [] int32, how many of a step's B draws are wanted, at least one and at most B; all if
            None. Those are the draws that this number alone as `batch` would give.

    Returns:
        indices_SxB int32, each below `population`; 0 in the place of what is not wanted.

    Raises:
        UserError: a size is below one.
    """
    for name, value in (("size", size), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    population = jnp.asarray(population, jnp.int32)
    words_N = jax.random.bits(key, (size,), jnp.uint32)
    present_N = jnp.arange(size, dtype=jnp.int32) < population
    # Padding sorts last: the sort is stable and padding stands behind every present entry.
    shuffled_N = jnp.argsort(jnp.where(present_N, words_N, jnp.uint32(2**32 - 1)), stable=True)
    members = jnp.maximum(population, jnp.int32(1))
    if own is None:
        places = jnp.arange(steps * batch, dtype=jnp.int32) % members
        return shuffled_N.astype(jnp.int32)[places].reshape(steps, batch)
    place_B = jnp.arange(batch, dtype=jnp.int32)
    places_SxB = jnp.arange(steps, dtype=jnp.int32)[:, None] * own + place_B[None]
    drawn_SxB = shuffled_N.astype(jnp.int32)[places_SxB % members]
    return jnp.where(place_B[None] < own, drawn_SxB, jnp.int32(0))
