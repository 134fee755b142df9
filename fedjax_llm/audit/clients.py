"""A one-run audit of unit client: rounds in which some clients are canaries.

The sum is the federation's, step by step: `MessageCodec.encode` clips and rounds each message,
integers are added, the sum is decoded, and the server's Gaussian noise is added to it, with the
same keys. What local training would put into the messages of real clients is given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.audit.canaries import Canaries, toss
from fedjax_llm.audit.examples import SCALE
from fedjax_llm.audit.keys import AuditPurpose, audit_key
from fedjax_llm.audit.one_run import AuditReport, Method, audit
from fedjax_llm.audit.scores import Scorer
from fedjax_llm.errors import UserError
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.federation.message import MessageCodec, fitting_bits
from fedjax_llm.privacy import PrivacyPlan, gaussian_noise_like, poisson_sample

PyTree = Any


def audit_clients(
    messages: PyTree,
    *,
    canaries: int,
    rounds: int,
    clip_norm: float,
    noise_multiplier: float,
    delta: float,
    rate: float = 1.0,
    seed: int = 0,
    codec_norm: float | None = None,
    bits: int | None = None,
    confidence: float = 0.95,
    method: Method = "f-dp",
) -> AuditReport:
    """Sums the messages of real clients and canaries for some rounds and reports what shows.

    Each canary is a client or not by a fair coin; the accountant counts all of them. A client takes
    part in a round with probability `rate`.

    Formal guarantee: that of `one_run.audit`. Scores follow from the noised sums of the
    rounds, which are what the plan says is released up to a public factor.

    Args:
        messages: pytree of float32 arrays with the leading axis K of the real clients, their
            messages before the clip, the same in every round; K may be 0.
        canaries: how many coins are tossed.
        rounds: of the run.
        clip_norm: what the accountant is told; with `noise_multiplier`, it gives the noise.
        noise_multiplier: noise over `clip_norm`.
        delta: of the claim.
        rate: probability with which a client takes part in a round.
        seed: of the run.
        codec_norm: to which messages are really clipped; None clips them to `clip_norm`. Another
            one makes a run that does not keep what it promises.
        bits: of one coordinate; None takes as many as the sums of so many clients allow.
        confidence: of the bound.
        method: see `one_run.audit`.

    Raises:
        UserError: too many canaries or bits; as `PrivacyPlan`.
        Refused: as `PrivacyPlan` and `FixedPoint.clip_norm_before_rounding`.
    """
    leaves = jax.tree.leaves(messages)
    if not leaves or any(leaf.ndim < 2 for leaf in leaves):
        raise UserError("messages need a leading axis of clients on every array, and one array")
    real = leaves[0].shape[0]
    clients = real + canaries
    plan = PrivacyPlan.for_clients(
        clients,
        rounds=rounds,
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        delta=delta,
        rate=rate,
    )
    like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], jnp.float32), messages)
    codec = MessageCodec.for_tree(
        like,
        max_norm=clip_norm if codec_norm is None else codec_norm,
        bits=fitting_bits(bits, clients),
        clients=clients,
    )
    key = seed_key(seed)
    coins_M = toss(audit_key(key, AuditPurpose.COINS), canaries)
    planted = Canaries.draw(
        audit_key(key, AuditPurpose.CANARIES), like, canaries, SCALE * clip_norm
    )
    length = codec.fixed_point.clip_norm_before_rounding(clip_norm, codec.size)
    scorer = Scorer(plan.sampler.rates[0], length, plan.noise_stddev)
    present_C = jnp.concatenate([jnp.ones(real, bool), coins_M])

    @jax.jit
    def run_round(
        planted: Canaries,
        messages: PyTree,
        present_C: jax.Array,
        scores_M: jax.Array,
        number: jax.Array,
    ) -> jax.Array:
        sampling = key_for(key, Purpose.CLIENT_SAMPLING, number)
        indices_C, count = poisson_sample(sampling, clients, plan.sampler.rates[0], clients)
        sampled_C = jnp.zeros(clients, bool)
        inside_C = jnp.arange(clients, dtype=jnp.int32) < count
        places_C = jnp.where(inside_C, indices_C, jnp.int32(clients))
        sampled_C = sampled_C.at[places_C].set(True, mode="drop")

        def add(total_P: jax.Array, tree: PyTree, takes_part: jax.Array) -> jax.Array:
            ints_P = codec.encode(tree).ints_P
            return total_P + jnp.where(takes_part, ints_P, jnp.int32(0))

        def add_real(total_P: jax.Array, each: tuple[PyTree, jax.Array]) -> tuple[jax.Array, None]:
            return add(total_P, *each), None

        def add_canary(
            total_P: jax.Array, each: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            number, takes_part = each
            return add(total_P, planted.contribution(number, like), takes_part), None

        part_C = sampled_C & present_C
        total_P = jnp.zeros(codec.size, jnp.int32)
        total_P, _ = jax.lax.scan(add_real, total_P, (messages, part_C[:real]))
        numbers_M = jnp.arange(canaries, dtype=jnp.int32)
        total_P, _ = jax.lax.scan(add_canary, total_P, (numbers_M, part_C[real:]))
        sum_P = codec.decode(total_P)
        noise = key_for(key, Purpose.SERVER_NOISE, number)
        sum_P = sum_P + gaussian_noise_like(noise, sum_P, plan.noise_stddev)
        return scorer.add(planted, scores_M, sum_P)

    scores_M = scorer.init(planted)
    for number in range(1, rounds + 1):
        scores_M = run_round(planted, messages, present_C, scores_M, jnp.int32(number))
    return audit(
        np.asarray(scores_M), np.asarray(coins_M), plan, confidence=confidence, method=method
    )
