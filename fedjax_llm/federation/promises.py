"""What a federation promises against what it does: a difference is refused before it runs."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedjax_llm.aggregation import AggregationRule, NormalisedMean
from fedjax_llm.aggregation.attacks import READ_OTHERS, Attack
from fedjax_llm.aggregation.robust import Combine, GroupRobust
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.sums import Plain, Selective, SumMode, majority
from fedjax_llm.federation.tables import Participant, sampler_of
from fedjax_llm.privacy import IntegerMechanism, PrivacyPlan, check_weights
from fedjax_llm.privacy.weights import Weights as WeightKind
from fedjax_llm.training import Drift, LocalTraining

Combination = NormalisedMean | Combine | GroupRobust


def check_selective(plan: PrivacyPlan, sum_mode: SumMode, rule: AggregationRule) -> None:
    """Refuses parameters in the clear that their own cloud has not noised.

    Formal guarantee: for the federations that pass, all that a cloud sends in the clear, in all
    rounds, satisfies the plan's (epsilon, delta) for adding or removing one example of that cloud,
    against whoever reads it, the server included. For with unit `example` every local step of
    every cloud is a Gaussian mechanism by itself: noise of standard deviation
    noise multiplier x clip norm on that cloud's sum alone, not a share of a common noise
    (`training.local`). The plan composes these steps for each cloud at its own sampling rate and
    takes no credit for the addition over clouds. Optimiser, weight, shortening, rounding and the
    choice of coordinates follow from noised sums and public numbers. A part of a private message
    is private.

    What changes with the clear part is the observer: the server reads these coordinates of every
    cloud alone, with one cloud's noise instead of all clouds' noise, and without the protection
    that encryption gives to what no epsilon covers: what the examples of a cloud have in common.

    | plan | result |
    |---|---|
    | unit `example` or `user` with a certified epsilon | passes |
    | unit `example` or `user`, noise too small to be accounted for | Refused |
    | unit `client`: its noise is added after the sum | Refused |
    | unit `none` | Refused |
    """
    if not isinstance(sum_mode, Selective):
        return
    if len({rule.sent(phase) for phase in range(len(rule.phases))}) > 1:
        raise UserError(
            f"rule {rule.name!r} sends other things in other rounds, and a selection is of one; "
            "encrypt everything, or choose another rule"
        )
    if plan.unit not in ("example", "user"):
        why = (
            "the noise of unit client is added after the sum"
            if plan.unit == "client"
            else "no noise is added"
        )
        raise Refused(
            f"selective encryption needs privacy unit 'example', got {plan.unit!r}: {why}, and "
            "the server would read the exact values of what stays in the clear; encrypt "
            "everything, or use unit example"
        )
    report = plan.report()
    if report.epsilon is None:
        raise Refused(
            f"selective encryption needs noise that certifies an epsilon: {report.reason}; raise "
            "the noise multiplier or encrypt everything"
        )


def check_combination(
    *,
    rule: AggregationRule,
    unit: str,
    drift: Drift,
    hidden: bool,
    combine: Combination | None,
    bound: float,
    weighs: bool,
    normalises: bool = False,
    by_loss: bool = False,
    attack: Attack | None = None,
) -> None:
    """Refuses parts of a federation that do not go together, with the reason.

    Args:
        rule: what is trained and sent.
        unit: of privacy.
        drift: of local training.
        hidden: whether the sum hides single messages.
        combine: how messages are combined; None is the mean.
        bound: the largest l2 norm of a message.
        weighs: whether clients count unequally.
        normalises: whether FedNova weighs different numbers of local steps against each other.
        by_loss: whether weights follow from losses.
        attack: what malicious clients of a simulation do, or None.

    Raises:
        Refused: something would be read that a sum or a privacy unit hides.
        UserError: something would have no meaning.
    """
    robust = None if isinstance(combine, NormalisedMean) else combine
    if hidden and rule.needs_individual_messages:
        raise Refused(
            f"rule {rule.name!r} has to read each cloud's message, which an encrypted sum hides; "
            "choose the plain sum or another rule"
        )
    if hidden and isinstance(robust, Combine):
        raise Refused(
            f"combination {robust.name!r} has to read each cloud's message, which an encrypted "
            "sum hides; choose the plain sum, groups, or another combination"
        )
    if unit == "client":
        _check_client_unit(rule, robust is not None)
        if attack in READ_OTHERS:
            raise Refused(
                "the attackers make their messages out of other clients', so that one client more "
                "or less changes several: no epsilon covers that; use unit 'none' or 'example'"
            )
    if combine is not None and rule.stages > 1:
        raise UserError(
            f"rule {rule.name!r} sends sketches that only a mean can combine; leave combine out"
        )
    if combine is not None and rule.needs_individual_messages:
        raise UserError(
            f"rule {rule.name!r} combines the clients' factors itself; leave combine out"
        )
    if robust is not None and (weighs or rule.weighs_by_result):
        raise UserError(
            "a robust combination counts each client once: use uniform weights, and a rule that "
            "does not weigh by result"
        )
    if robust is not None and len({rule.sent(phase) for phase in range(len(rule.phases))}) > 1:
        raise UserError(
            f"rule {rule.name!r} sends other things in other rounds, and a robust combination "
            "compares like with like; choose another rule"
        )
    if isinstance(combine, NormalisedMean) and bound > 1:
        raise UserError(
            f"messages may be {bound:g} long, and normalised ones have length 1: who does not "
            "normalise would count that many times; lower update_bound (with unit client: the clip "
            "norm) to 1"
        )
    if normalises and (
        by_loss or rule.weighs_by_result or rule.needs_individual_messages or combine is not None
    ):
        raise UserError(
            "normalise_steps divides each client's change by its steps in a mean of weights known "
            "beforehand; leave it out with weights by loss or result, stacked adapters or combine"
        )
    if drift.control and rule.new_coordinates:
        raise UserError(
            f"rule {rule.name!r} writes the adapter in new coordinates each round, where control "
            "variates of the last mean nothing; choose another rule"
        )
    if drift.control and (robust or rule.kept or rule.needs_individual_messages):
        raise UserError(
            "control variates are means over all clients of what they train; they do not go with "
            "robust combination, with stacked or with personal adapters"
        )
    if drift.control and rule.stages > 1:
        raise UserError(f"control variates travel in one sum; rule {rule.name!r} has several")


def _check_client_unit(rule: AggregationRule, robust: bool) -> None:
    """Unit `client` needs one sum a round that noise can be added to."""
    if rule.needs_individual_messages or robust:
        what = f"rule {rule.name!r}" if rule.needs_individual_messages else "a robust combination"
        raise Refused(
            f"{what} adds no noise to a sum, as unit 'client' needs; choose a rule that adds, "
            "or unit 'example', where each client's message is private by itself"
        )
    if rule.kept:
        raise Refused(
            f"rule {rule.name!r} leaves each client a part that no noise is added to; with unit "
            "'client' choose another rule"
        )
    if rule.stages > 1:
        raise Refused(
            f"rule {rule.name!r} releases {rule.stages} sums a round and the plan of unit "
            "'client' accounts for one; choose another rule, or unit 'example'"
        )


def weight_kinds(rule: AggregationRule, kind: WeightKind) -> tuple[WeightKind, ...]:
    """All that the weights of clients follow from, in the privacy plan's words.

    Args:
        rule: may weigh clients by their results besides.
        kind: how they are weighed otherwise.
    """
    return (kind, "result") if rule.weighs_by_result else (kind,)


def check_plan(
    plan: PrivacyPlan,
    training: LocalTraining,
    participants: Sequence[Participant],
    weights: Sequence[WeightKind],
) -> None:
    """Refuses a run whose training, data or weights are not those that the plan accounts for.

    Args:
        plan: what is promised.
        training: what clients do.
        participants: the clients.
        weights: `weight_kinds` of what weighs them; the plan names the last.
    """
    if (plan.unit in ("example", "user")) != (training.privacy is not None):
        raise Refused(
            f"the plan's unit is {plan.unit!r} but local training "
            f"{'clips and noises each example' if training.privacy else 'does not clip examples'}"
        )
    if training.privacy is not None:
        _check_examples(plan, training, participants)
    if plan.unit == "client" and plan.units != (len(participants),):
        raise Refused(f"the plan accounts for {plan.units} clients, there are {len(participants)}")
    if plan.unit == "none":
        return
    for kind in weights:
        check_weights(plan.unit, kind)
    if plan.weights != weights[-1]:
        raise Refused(
            f"the clients are weighed by {weights[-1]!r}, the plan accounts for {plan.weights!r}"
        )


def _check_examples(
    plan: PrivacyPlan, training: LocalTraining, participants: Sequence[Participant]
) -> None:
    assert training.privacy is not None
    done = (training.privacy.sensitivity, training.privacy.noise_multiplier)
    # Norms of several groups add up to the plan's but for float64 rounding.
    alike = math.isclose(done[0], plan.clip_norm, rel_tol=1e-12)
    if not alike or done[1] != plan.noise_multiplier:
        raise Refused(
            f"local training clips and noises with {done} ({training.privacy.clip_norm}), the plan "
            f"accounts for {(plan.clip_norm, plan.noise_multiplier)}"
        )
    ranks = {participant.rank for participant in participants}
    if training.privacy.method == "ghost" and len(ranks) > 1:
        raise UserError(
            "ghost norms take one rank for all clients, and ranks differ; use the gradients "
            '"vmap", or one rank'
        )
    if training.privacy.adaptive != plan.adaptive:
        raise Refused(
            f"the clip norm of local training follows {training.privacy.adaptive}, the plan "
            f"accounts for {plan.adaptive}"
        )
    if training.privacy.correlation != plan.correlation:
        raise Refused(
            f"the noise of local training hangs together by {training.privacy.correlation}, the "
            f"plan accounts for {plan.correlation}"
        )
    if plan.unit == "example" and any(
        np.max(participant.train.segments_BxT) > 1 for participant in participants
    ):
        raise Refused("a row holds several examples; pack nothing with unit 'example'")
    rows = tuple(participant.rows for participant in participants)
    if rows != plan.units:
        raise Refused(f"the plan counts {plan.units} {plan.unit}s, the clouds hold {rows}")
    plan.check_sampler(sampler_of(participants, training))


def check_correlation(plan: PrivacyPlan, rule: AggregationRule) -> None:
    """Refuses correlated noise that could not take off what was added before.

    Raises:
        UserError: the rule sends other things in other rounds, or in other coordinates.
    """
    if plan.correlation is None or plan.correlation.bands == 1:
        return
    if len(rule.phases) > 1 or rule.new_coordinates:
        raise UserError(
            f"{plan.correlation.name} noise takes off what was added before, and rule "
            f"{rule.name!r} sends something else, or in other coordinates, each round; use noise "
            '"gaussian", or a rule such as ffa'
        )


def check_integer(
    plan: PrivacyPlan, done: IntegerMechanism, participants: Sequence[Participant], mode: SumMode
) -> None:
    """Refuses integer noise that is not what the plan accounts for, or not enough for who sees it.

    Args:
        plan: what is promised; with integer noise.
        done: what the messages of the run amount to.
        participants: the clients.
        mode: of the sum.

    Raises:
        Refused: shares that are not enough for what the server or colluding clients read, or other
            than planned.
    """
    shares = done.shares
    if done != plan.integer:
        raise Refused(
            f"messages are noised by {done}, the plan accounts for {plan.integer}; its epsilon "
            "would be wrong"
        )
    if shares.clients != len(participants):
        raise Refused(
            f"the noise is planned for {shares.clients} clients, there are {len(participants)}"
        )
    if plan.trust == "local":
        if shares.counted != 1:
            raise Refused(
                f'with trust "local" each share is the whole noise, and these are 1/'
                f"{shares.counted} of it; count {len(participants) - 1} dropouts"
            )
        return
    if isinstance(mode, Plain | Selective):
        raise Refused(
            "the server reads each message, or a part of it, under its own share of the noise, "
            'which is too little; encrypt everything, or choose trust "local"'
        )
    clouds = Counter(participant.cloud.name for participant in participants)
    threshold = majority(len(clouds)) if mode.threshold is None else mode.threshold
    if shares.colluding >= threshold:
        raise Refused(
            f"{shares.colluding} colluding clients can be {threshold} clouds, who open single "
            "messages, each with one share of the noise; raise the threshold, or count fewer"
        )
    least = fewest_clouds(list(clouds.values()), shares.dropouts)
    if mode.minimum_clients < least:
        raise Refused(
            f"sums of {mode.minimum_clients} clouds may be opened, and the noise is planned for "
            f"those of {least} or more; raise minimum_clients to that, or plan for more dropouts"
        )


def fewest_clouds(sizes: Sequence[int], dropouts: int) -> int:
    """The fewest clouds whose loss of the others is within so many clients.

    >>> fewest_clouds([1, 1, 1], 1), fewest_clouds([3, 1, 1], 2), fewest_clouds([3, 3], 2)
    (2, 1, 2)
    """
    lost = 0
    for count, size in enumerate(sorted(sizes)):
        lost += size
        if lost > dropouts:
            return max(len(sizes) - count, 1)
    return 1
