"""A one-run audit of unit example: one client trains, on real rows and on canaries.

All that trains is the code that trains in a federation: `training.client_update`, its sampling, its
clip, its noise. What is claimed of it goes to the accountant apart from what is done, so that an
audit can also show what it takes to catch a run that does not do what it claims.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.audit.canaries import Canaries, plant, toss, with_canaries
from fedjax_llm.audit.keys import AuditPurpose, audit_key
from fedjax_llm.audit.one_run import AuditReport, Method, audit
from fedjax_llm.audit.scores import Scorer, observed
from fedjax_llm.errors import UserError
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import (
    ClientTable,
    ExamplePrivacy,
    LocalTraining,
    client_update,
    each_row,
    optimizer_init,
)

PyTree = Any
RowLossOfBase = Callable[[PyTree, PyTree, PyTree], jax.Array]

# Length of a canary before the clip, in clip norms. More would tell a missing clip no better, and
# would throw the parameters of such a run about.
SCALE = 32.0


def audit_examples(
    row_loss: RowLossOfBase,
    base: PyTree,
    trainable: PyTree,
    rows: PyTree,
    training: LocalTraining,
    *,
    canaries: int,
    rounds: int,
    delta: float,
    seed: int = 0,
    claimed: ExamplePrivacy | None = None,
    confidence: float = 0.95,
    method: Method = "f-dp",
) -> AuditReport:
    """Trains one client for some rounds and reports how much of its canaries can be read.

    Each canary is among the rows or not by a fair coin. Each step takes every row with probability
    batch_size / (real rows + canaries), as `PrivacyPlan.for_examples` has it with the canaries,
    present or not, counted among the public number of examples.

    Formal guarantee: that of `one_run.audit`. Scores follow from the noised gradients of the
    steps, which the plan says are released, and from nothing else of the run.

    It takes one gradient for each canary in each step that holds it, and the model's forward and
    backward pass with it: canaries cost as much as examples.

    Args:
        row_loss: `(base, trainable, row) -> loss`.
        base: frozen weights, an argument of the compiled program.
        trainable: float32 tree of P parameters; there may be P / 2 canaries at least.
        rows: pytree of arrays with the leading axis of the real rows.
        training: with `privacy`, which is what is done.
        canaries: how many coins are tossed.
        rounds: calls of `client_update`; the optimiser's state goes from one to the next.
        delta: of the claim.
        seed: of the run.
        claimed: what the accountant is told of clip and noise; None tells it what is done.
        confidence: of the bound.
        method: see `one_run.audit`.

    Raises:
        UserError: training without privacy, or with correlated noise, an adaptive clip norm or
            turns; too many canaries; as `PrivacyPlan`.
        Refused: as `PrivacyPlan`.
    """
    done = training.privacy
    if done is None:
        raise UserError(
            "an audit per example needs training with privacy; set LocalTraining.privacy"
        )
    told = done if claimed is None else claimed
    for privacy in (done, told):
        if privacy.correlation is not None or privacy.adaptive is not None or privacy.period != 1:
            raise UserError(
                "an audit per example takes independent noise, one clip norm and no turns; leave "
                "correlation, adaptive and period of ExamplePrivacy out"
            )
    real = jax.tree.leaves(rows)[0].shape[0]
    plan = PrivacyPlan.for_examples(
        [real + canaries],
        expected_batch=training.batch_size,
        steps_per_round=training.steps,
        rounds=rounds,
        clip_norm=told.sensitivity,
        noise_multiplier=told.noise_multiplier,
        delta=delta,
    )
    key = seed_key(seed)
    coins_M = toss(audit_key(key, AuditPurpose.COINS), canaries)
    planted = Canaries.draw(
        audit_key(key, AuditPurpose.CANARIES), trainable, canaries, SCALE * told.sensitivity
    )
    rate = plan.sampler.rates[0]
    table = plant(ClientTable(rows, jnp.int32(real), jnp.float32(rate)), coins_M, rate)
    scorer = Scorer(rate, told.sensitivity, plan.noise_stddev)

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def run_round(
        base: PyTree,
        planted: Canaries,
        table: ClientTable,
        trainable: PyTree,
        state: PyTree,
        number: jax.Array,
    ) -> tuple[PyTree, PyTree]:
        watched = replace(
            training,
            optimizer=observed(training.optimizer, planted, scorer, training.batch_size),
        )
        trained = client_update(
            each_row(with_canaries(functools.partial(row_loss, base), planted)),
            watched,
            trainable,
            state,
            table,
            key_for(key, Purpose.EXAMPLE_SAMPLING, number),
            key_for(key, Purpose.LOCAL_NOISE, number),
        )
        return trained.trainable, trained.optimizer

    # Scores only: what the caller holds must stay valid, and the first round donates its arguments.
    trainable = jax.tree.map(jnp.array, trainable)
    optimizer = observed(training.optimizer, planted, scorer, training.batch_size)
    state = optimizer_init(optimizer, trainable)
    for number in range(1, rounds + 1):
        trainable, state = run_round(base, planted, table, trainable, state, jnp.int32(number))
    scores_M = np.asarray(state[1])
    return audit(scores_M, np.asarray(coins_M), plan, confidence=confidence, method=method)
