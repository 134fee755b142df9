"""What a federation promises against what it does: a difference is refused before it runs."""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.errors import Refused
from fedjax_llm.federation.sums import Plain, SumMode
from fedjax_llm.federation.tables import Participant, sampler_of
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import LocalTraining


def check_sum(rule: AggregationRule, sum_mode: SumMode) -> None:
    """Refuses a rule that must see single messages under a sum that hides them."""
    if rule.needs_individual_messages and not isinstance(sum_mode, Plain):
        raise Refused(
            f"rule {rule.name!r} has to read each cloud's message, which an encrypted sum hides; "
            "choose the plain sum or another rule"
        )


def check_plan(
    plan: PrivacyPlan,
    training: LocalTraining,
    participants: Sequence[Participant],
    weights_K: np.ndarray,
) -> None:
    """Refuses a run whose training, data or weights are not those that the plan accounts for."""
    if (plan.unit == "example") != (training.privacy is not None):
        raise Refused(
            f"the plan's unit is {plan.unit!r} but local training "
            f"{'clips and noises each example' if training.privacy else 'does not clip examples'}"
        )
    if plan.unit == "example":
        _check_examples(plan, training, participants)
    if plan.unit == "client":
        if plan.units != (len(participants),):
            raise Refused(
                f"the plan accounts for {plan.units} clients, there are {len(participants)}"
            )
        if np.any(weights_K != 1):
            raise Refused("weights other than uniform depend on the data that unit 'client' hides")


def _check_examples(
    plan: PrivacyPlan, training: LocalTraining, participants: Sequence[Participant]
) -> None:
    assert training.privacy is not None
    done = (training.privacy.clip_norm, training.privacy.noise_multiplier)
    if done != (plan.clip_norm, plan.noise_multiplier):
        raise Refused(
            f"local training clips and noises with {done}, the plan accounts for "
            f"{(plan.clip_norm, plan.noise_multiplier)}"
        )
    if any(np.max(participant.train.segments_BxT) > 1 for participant in participants):
        raise Refused("a row holds several examples; pack nothing with unit 'example'")
    rows = tuple(participant.rows for participant in participants)
    if rows != plan.units:
        raise Refused(f"the plan counts {plan.units} examples, the clouds hold {rows}")
    plan.check_sampler(sampler_of(participants, training))
