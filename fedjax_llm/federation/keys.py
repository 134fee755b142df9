"""Randomness has an address: every key is derived from the seed, a purpose, a round and a client.

A draw therefore never depends on how many draws came before it, on how clients are grouped, or
on whether the run was interrupted: that is what makes a resumed run end in the same bytes.

Keys of a seed are for simulation: threefry keys hold 64 bits. Private noise and samples can have a
secret root of 256 bits beside it (`Seeds`); secrets of the encrypted sum come from the operating
system's generator and never from here.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import Refused
from fedjax_llm.privacy import PrivacyPlan, is_secret


class Purpose(enum.IntEnum):
    """What a draw is for. The numbers are part of a run's identity: never renumber them."""

    ADAPTER_INIT = 1
    EXAMPLE_SAMPLING = 2
    LOCAL_NOISE = 3
    CLIENT_SAMPLING = 4
    SERVER_NOISE = 5
    RULE = 6
    ATTACK = 7
    NOISE_SHARE = 8
    COUNT_NOISE = 9
    COMPRESSION = 10
    ROUNDING = 11


# What no other party may know or repeat.
_PRIVATE = frozenset(
    {
        Purpose.EXAMPLE_SAMPLING,
        Purpose.LOCAL_NOISE,
        Purpose.CLIENT_SAMPLING,
        Purpose.SERVER_NOISE,
        Purpose.NOISE_SHARE,
        Purpose.COUNT_NOISE,
    }
)


class Seeds(NamedTuple):
    """Two roots of randomness.

    Attributes:
        public: of what all parties know: the adapter's start, what a rule draws.
        private: of noise and samples, from `privacy.secret_key`.
    """

    public: jax.Array
    private: jax.Array


def seed_key(seed: int) -> jax.Array:
    """Returns the run's key; for seeds below 2^32 it is `jax.random.key(seed)`.

    That function drops the upper half of a seed where 64-bit types are off, so that runs of
    different seeds would draw the same noise.

    Args:
        seed: in [0, 2^64).
    """
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")


def roots_of(seed: int, noise_key: jax.Array | None, plan: PrivacyPlan) -> jax.Array | Seeds:
    """The roots of a run's randomness, if they are those that its privacy plan names.

    Args:
        seed: in [0, 2^64).
        noise_key: of noise and samples, from `privacy.secret_key`; None for those of the seed.
        plan: says whether noise comes from the seed or from the operating system.

    Raises:
        Refused: a noise key that is not secret, is missing or is not meant to be there.
    """
    if noise_key is not None and not is_secret(noise_key):
        raise Refused(
            "the noise key is one of JAX's own, of 64 bits or fewer; make it with "
            "privacy.secret_key"
        )
    if (plan.generator == "system") != (noise_key is not None):
        raise Refused(
            f"the plan says that noise comes from the {plan.generator}, and the federation has "
            f"{'a' if noise_key is not None else 'no'} secret noise key; make them agree"
        )
    public = seed_key(seed)
    return public if noise_key is None else Seeds(public, noise_key)


def key_for(
    seed: jax.Array | Seeds,
    purpose: Purpose,
    round_index: jax.Array | int = 0,
    client: jax.Array | int = 0,
) -> jax.Array:
    """Returns the key of one purpose, round and client.

    Args:
        seed: the run's key, from `seed_key`, or two.
        purpose: what the draw is for.
        round_index: the round, from 1; 0 for draws that belong to no round.
        client: the client's index in the run file; 0 for the server's draws.
    """
    if isinstance(seed, Seeds):
        seed = seed.private if purpose in _PRIVATE else seed.public
    key = jax.random.fold_in(seed, int(purpose))
    return jax.random.fold_in(jax.random.fold_in(key, round_index), client)
