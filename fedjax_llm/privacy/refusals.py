"""Plans that cannot be certified, each with its reason and its cure."""

import math
from typing import TYPE_CHECKING

from fedjax_llm.errors import Refused, UserError

from .weights import check_weights

if TYPE_CHECKING:
    from .mechanism import Mechanism

_TRUSTS = ("local", "central", "distributed")


def check(plan: "Mechanism") -> None:
    """Refuses a plan with a unit that promises what its mechanism does not keep.

    Raises:
        UserError, Refused: see the table of `PrivacyPlan`.
    """
    _check_promise(plan)
    _check_mechanism(plan)


def _check_promise(plan: "Mechanism") -> None:
    unit, total = plan.unit, sum(plan.units)
    if plan.sampler.kind == "fixed":
        raise Refused(
            f"fixed-size batches cannot be accounted as Poisson samples for unit {unit}; "
            "use the poisson sampler or full participation"
        )
    if not 0 < plan.noise_multiplier < math.inf:
        raise Refused(
            f"noise multiplier {plan.noise_multiplier:g} certifies no epsilon for unit {unit}; "
            'make it positive and finite, or ask for no privacy with unit "none"'
        )
    if not 0 < plan.delta < 1 / total:
        raise Refused(
            f"delta must be above 0 and below 1/{total} (one over the number of {unit}s), "
            f"got {plan.delta:g}: a larger one allows publishing a whole {unit}"
        )
    check_weights(unit, plan.weights)
    if unit == "client" and (len(plan.units) != 1 or len(plan.sampler.rates) != 1):
        raise UserError("unit client takes one number of clients and one sampling rate")
    if unit == "client" and plan.sampler.steps_per_round != 1:
        raise UserError("unit client sums once per round; steps per round must be 1")
    if unit != "client" and len(plan.units) != len(plan.sampler.rates):
        raise UserError(
            f"unit {unit} needs one sampling rate for each cloud, got "
            f"{len(plan.sampler.rates)} for {len(plan.units)} clouds"
        )
    if unit != "client" and plan.packed:
        raise Refused(
            "a packed row holds several examples and clipping it bounds none of them alone; "
            f"switch packing off with unit {unit}"
        )
    if plan.clip_norm_from == "data":
        raise Refused(
            f"clip norm {plan.clip_norm:g} was chosen by looking at the private data, which no "
            "budget covers; choose it on public data, or let a private quantile move it"
        )
    if unit == "client" and plan.error_feedback:
        raise Refused(
            "error feedback adds to a message after its clip what earlier ones left out, so "
            "that nothing bounds it; switch it off with unit client, or clip after it"
        )


def _check_mechanism(plan: "Mechanism") -> None:
    unit, trust = plan.unit, plan.trust
    if trust not in _TRUSTS:
        raise UserError(f"trust must be one of {', '.join(_TRUSTS)}; got {trust}")
    if unit != "client" and trust != "local":
        raise UserError(
            f"unit {unit} is protected by the noise of its own cloud alone; trust is local, "
            f"got {trust}"
        )
    if unit == "client" and (plan.integer is None) != (trust == "central"):
        raise UserError(
            f"trust {trust} of unit client goes {'without' if trust == 'central' else 'with'} "
            "integer noise of the clients"
        )
    if plan.integer is not None and unit != "client":
        raise UserError(
            f"integer noise is added to one sum a round, which is unit client; leave it out of a "
            f"plan per {unit}"
        )
    if plan.integer is not None and plan.correlation is not None:
        raise UserError("the clients' integer noise is independent; leave the correlation out")
    if plan.adaptive is not None:
        _check_adaptive(plan)
    if plan.correlation is not None and plan.correlation.steps != plan.steps:
        raise UserError(
            f"the correlation is made for {plan.correlation.steps} steps, the plan has "
            f"{plan.steps}; make it for as many"
        )
    if plan.adjacency == "replace" and (
        plan.correlation is not None or plan.integer is not None or plan.sampler.period > 1
    ):
        raise Refused(
            "neighbours by replacement are accounted for independent Gaussian noise and a turn "
            'in every step alone; use adjacency "add-remove"'
        )
    if plan.budget is not None and not plan.budget > 0:
        raise UserError(f"the budget must be above 0, got {plan.budget:g}")


def _check_adaptive(plan: "Mechanism") -> None:
    assert plan.adaptive is not None
    if plan.adaptive.initial_norm != plan.clip_norm:
        raise UserError(
            f"the adaptive clip norm begins at {plan.adaptive.initial_norm:g} and the plan's is "
            f"{plan.clip_norm:g}; make them equal"
        )
    if plan.correlation is not None or plan.integer is not None or plan.adjacency == "replace":
        raise UserError(
            "an adaptive clip norm goes with independent Gaussian noise and units that are added "
            "or removed; leave one of the two out"
        )
    plan.adaptive.sum_noise_multiplier(plan.noise_multiplier)
