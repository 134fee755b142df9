"""Randomness of audits: coins and canaries have addresses of their own beside a federation's."""

import enum

import jax


class AuditPurpose(enum.IntEnum):
    """What a draw is for. Apart from `federation.keys.Purpose`, whose numbers count up from 1."""

    COINS = 1001
    CANARIES = 1002


def audit_key(seed: jax.Array, purpose: AuditPurpose) -> jax.Array:
    """The key of a purpose, from the run's key (`federation.keys.seed_key`)."""
    return jax.random.fold_in(seed, int(purpose))
