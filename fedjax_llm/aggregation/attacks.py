"""What malicious clients put in place of their messages, to measure how well a defence holds.

Attackers know everything: the honest messages, who is present, how many they are. Only rows that
are malicious and present change. Label flipping changes data, not messages, and is not here.

Letters: K clients, P parameters; n clients present, m of them malicious.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.robust import masked

# (messages_KxP float32, malicious_K bool, present_K bool, key, scale) -> messages_KxP
Attack = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, float | jax.Array],
    jax.Array,
]


def sign_flip(
    messages_KxP: jax.Array,
    malicious_K: jax.Array,
    present_K: jax.Array,
    key: jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """A malicious client sends -scale times its own message (arXiv 1811.03761)."""
    return scaled(messages_KxP, malicious_K, present_K, key, -jnp.asarray(scale, jnp.float32))


def scaled(
    messages_KxP: jax.Array,
    malicious_K: jax.Array,
    present_K: jax.Array,
    key: jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """A malicious client sends scale times its own message (arXiv 1807.00459).

    With scale = n its message alone becomes the mean: model replacement.
    """
    del key
    forged_KxP = jnp.asarray(scale, jnp.float32) * messages_KxP
    return jnp.where((malicious_K & present_K)[:, None], forged_KxP, messages_KxP)


def gaussian(
    messages_KxP: jax.Array,
    malicious_K: jax.Array,
    present_K: jax.Array,
    key: jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """A malicious client sends noise of a set length (after arXiv 1703.02757).

    The noise is z scale L / |z|: z is a draw from N(0, I_P) of its own for each client, and L the
    mean l2 norm of the messages of the honest clients present, 0 when there are none. The paper
    draws with a deviation of 200; a length relative to the honest ones suits every model.
    """
    honest_K = present_K & ~malicious_K
    length = masked.mean(masked.norms(masked.only(messages_KxP, honest_K))[:, None], honest_K)
    noise_KxP = jax.random.normal(key, messages_KxP.shape, jnp.float32)
    norm_K = jnp.maximum(masked.norms(noise_KxP), jnp.float32(masked.TINY))
    stretch_K = jnp.asarray(scale, jnp.float32) * length / norm_K
    forged_KxP = stretch_K[:, None] * noise_KxP
    return jnp.where((malicious_K & present_K)[:, None], forged_KxP, messages_KxP)


def z_max(number: jax.Array, malicious: jax.Array) -> jax.Array:
    """[] float32: how many deviations m of n clients may stray unnoticed.

    As in arXiv 1902.06156: s = floor(n / 2 + 1) - m honest clients make a
    majority with the malicious ones, and z_max is the normal quantile of (n - m - s) / (n - m).

    | n and m                        | z_max                                                   |
    |--------------------------------|---------------------------------------------------------|
    | m a majority, so s < 1         | that of s = 1: the formula says inf                     |
    | n <= 2, or m = 1 with n even   | 0: the formula is negative, no honest client is outdone |
    """
    honest = jnp.maximum(number - malicious, jnp.int32(1))
    supporters = jnp.maximum(number // jnp.int32(2) + jnp.int32(1) - malicious, jnp.int32(1))
    share = (honest - supporters).astype(jnp.float32) / honest.astype(jnp.float32)
    return jax.scipy.special.ndtri(jnp.maximum(share, jnp.float32(0.5)))


def little_is_enough(
    messages_KxP: jax.Array,
    malicious_K: jax.Array,
    present_K: jax.Array,
    key: jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """All malicious clients send mean - scale z_max std per coordinate (arXiv 1902.06156).

    Mean and (population) standard deviation are over the honest clients present, of whom the
    paper's attackers have only estimates; zeros when there are none. z_max: see `z_max`.
    """
    del key
    honest_K = present_K & ~malicious_K
    mean_P = masked.mean(messages_KxP, honest_K)
    std_P = jnp.sqrt(masked.mean(jnp.square(messages_KxP - mean_P[None]), honest_K))
    z = z_max(masked.count(present_K), masked.count(present_K & malicious_K))
    forged_P = mean_P - jnp.asarray(scale, jnp.float32) * z * std_P
    return jnp.where((malicious_K & present_K)[:, None], forged_P[None], messages_KxP)


ATTACKS: dict[str, Attack] = {
    "sign-flip": sign_flip,
    "scaled": scaled,
    "gaussian": gaussian,
    "little-is-enough": little_is_enough,
}

# Those whose message follows from other clients' messages as well.
READ_OTHERS: frozenset[Attack] = frozenset({gaussian, little_is_enough})
