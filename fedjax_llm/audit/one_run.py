"""From the scores of canaries to a lower bound on epsilon, out of one run.

The arithmetic of both tests is jax-privacy's, but for sampled plans (`trade_off`); what is decided
here is which guesses they judge.

Letters: M canaries, K guesses.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.audit.guesses import guesses_from
from fedjax_llm.audit.trade_off import least_private_refuted
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.privacy.sampler import Unit

Method = Literal["eps-delta", "f-dp"]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found, beside what the accountant promises.

    Attributes:
        lower_bound: on the epsilon of the run at `delta`; see `lower_bound`. 0 says nothing.
        upper_bound: the accountant's epsilon at `delta`; inf where it certifies none.
        delta: of both.
        method: how the lower bound was found.
        unit: what a canary is.
        canaries: M.
        confidence: probability with which the lower bound holds.
        guesses: how many canaries the best set of guesses was about; 0 without a bound.
        correct: how many of them were right.
    """

    lower_bound: float
    upper_bound: float
    delta: float
    method: Method
    unit: Unit
    canaries: int
    confidence: float
    guesses: int
    correct: int

    @property
    def consistent(self) -> bool:
        """Whether the run may be what the accountant takes it for.

        If it is, this is False with probability at most 1 - `confidence`. True proves nothing.
        """
        return self.lower_bound <= self.upper_bound

    def __str__(self) -> str:
        verdict = "consistent with" if self.consistent else "REFUTES"
        return (
            f"audit per {self.unit}: epsilon at least {self.lower_bound:.2f} at delta "
            f"{self.delta:g} with {100 * self.confidence:g} % confidence ({self.method}, "
            f"{self.canaries} canaries, {self.correct} of {self.guesses} guesses right), "
            f"{verdict} the accountant's {self.upper_bound:.2f}"
        )


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon and the guesses that gave it."""

    epsilon: float
    guesses: int
    correct: int


def audit(
    scores_M: Sequence[float] | NDArray[np.floating],
    taking_part_M: Sequence[bool] | NDArray[np.bool_],
    plan: PrivacyPlan,
    *,
    confidence: float = 0.95,
    method: Method = "f-dp",
    neutral: float | None = 0.0,
) -> AuditReport:
    """The report on a run of which `plan` is promised.

    Formal guarantee: with probability at least `confidence` over the coins and the run, the lower
    bound is at most the true epsilon of the run at the plan's delta, as `lower_bound` has it for
    "eps-delta", which assumes nothing. "f-dp" assumes the mechanism that the plan composes, at a
    noise multiplier of its own, whatever that is: the bound is at most the accountant's epsilon at
    that noise. In particular, a run that is what its plan says is reported as consistent with
    probability at least `confidence`, by either method.

    "f-dp" comes nearer: with full participation it is jax-privacy's test for a Gaussian trade-off,
    with Poisson sampling that of `trade_off`.

    Args:
        scores_M: see `lower_bound`.
        taking_part_M: see `lower_bound`.
        plan: with the canaries counted among its units.
        confidence: see `lower_bound`.
        method: see above; choose it before the scores are seen.
        neutral: see `lower_bound`.

    Raises:
        UserError: as `lower_bound`; a plan without a unit.
        Refused: "f-dp" for a plan whose mechanisms are neither Gaussian nor sampled Gaussians.
    """
    if plan.unit == "none":
        raise UserError('a plan with unit "none" promises nothing to audit; set a unit')
    sampled = plan.sampler.kind == "poisson"
    if method == "f-dp" and (
        plan.integer is not None
        or plan.adjacency != "add-remove"
        or (sampled and (plan.correlation is not None or plan.sampler.period != 1))
    ):
        raise Refused(
            "method f-dp knows the trade-off of independent Gaussian noise for adding or removing "
            "a unit, and not that of this plan; use method eps-delta"
        )
    found = lower_bound(
        scores_M,
        taking_part_M,
        delta=plan.delta,
        confidence=confidence,
        method=method,
        neutral=neutral,
        plan=plan if sampled else None,
    )
    promised = plan.epsilon()
    assert promised is not None
    return AuditReport(
        lower_bound=found.epsilon,
        upper_bound=promised,
        delta=plan.delta,
        method=method,
        unit=plan.unit,
        canaries=len(np.asarray(scores_M)),
        confidence=confidence,
        guesses=found.guesses,
        correct=found.correct,
    )


def lower_bound(
    scores_M: Sequence[float] | NDArray[np.floating],
    taking_part_M: Sequence[bool] | NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
    method: Method = "eps-delta",
    neutral: float | None = None,
    plan: PrivacyPlan | None = None,
) -> Bound:
    """A lower bound on the epsilon of a mechanism that M independent fair coins were put into.

    The auditor takes the canaries of scores above `neutral` for present and the others for absent,
    and stands by those K of these guesses whose scores are farthest from it. Of a private
    mechanism, no guesser is right too often.

    Formal guarantee. Let the scores be any function of the mechanism's output and of randomness
    that is independent of the coins. With probability at least `confidence` over the coins and the
    mechanism, the returned epsilon is

    - "eps-delta": at most every epsilon for which the mechanism is (epsilon, delta)-differentially
      private for adding or removing one unit (arXiv 2305.08846, section 5);
    - "f-dp": at most the epsilon at `delta` of every mu for which the mechanism is mu-GDP (arXiv
      2410.22235, section 3). If its trade-off is a Gaussian's, as that of a composition of
      unsampled Gaussian mechanisms is, this bounds its epsilon; of others it says only how Gaussian
      they can be. With `plan`, the same of the plan's mechanisms at all noise multipliers in place
      of the Gaussian ones.

    The tests hold for a number of guesses that is chosen without the coins. jax-privacy's own
    strategies choose with them: `Bonferroni` divides the probability of error by the number of
    thresholds on the convex hull of the receiver operating curve, a set that the coins pick out;
    `Split` deals present and absent canaries out separately, so that both halves hold equally many.
    Here K runs over the fixed shares of M in `guesses.GUESSED`, and all of M, parted where scores
    cluster; each is tested at an equal part of 1 - `confidence` (a union bound), and what is
    guessed follows from the scores alone.

    | scores | result |
    |---|---|
    | all equal | all guesses are alike; a bound of 0 but for luck within 1 - `confidence` |
    | equal at the K-th place | all of that distance are guessed; K is theirs |
    | infinite | the most extreme |
    | NaN | UserError |

    Args:
        scores_M: larger where the output speaks for the canary's presence.
        taking_part_M: bool, the coins.
        delta: in (0, 1).
        confidence: probability with which the bound holds.
        method: see above; choose it before the scores are seen.
        neutral: the score that speaks neither way, 0 for the log-likelihood ratios of `Scorer`;
            None takes the median.
        plan: for "f-dp" alone, whose mechanism is tested for in place of a Gaussian one.

    Returns:
        The largest bound of all K.

    Raises:
        UserError: lengths differ, no canary, a NaN, or delta or confidence out of range.
    """
    scores, coins = np.asarray(scores_M, np.float64), np.asarray(taking_part_M, bool)
    if scores.ndim != 1 or scores.shape != coins.shape or not scores.size:
        raise UserError(
            f"scores and coins must be two lists of one length, got shapes {scores.shape} and "
            f"{coins.shape}; give one of each for every canary"
        )
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} scores are NaN; did training diverge?")
    if not 0 < delta < 1:
        raise UserError(f"delta must be above 0 and below 1, got {delta:g}")
    if not 0 < confidence < 1:
        raise UserError(
            f"confidence must be above 0 and below 1, got {confidence:g}; 0.95 is usual"
        )
    if method not in get_args(Method):
        raise UserError(f"method must be one of {', '.join(get_args(Method))}; got {method}")

    outcomes = [
        (int(np.sum(guesses_M != 0)), int(np.sum(guesses_M == np.where(coins, 1, -1))))
        for guesses_M in guesses_from(scores, neutral)
    ]
    significance = (1 - confidence) / len(outcomes)
    if method == "f-dp" and plan is not None:
        return _bound_of_plan(plan, outcomes, scores.size, significance)
    best = Bound(0.0, 0, 0)
    for guesses, correct in outcomes:
        if 2 * correct <= guesses:
            continue
        epsilon = _epsilon(guesses, correct, scores.size, significance, delta, method)
        if epsilon > best.epsilon:
            best = Bound(epsilon, guesses, correct)
    return best


def _bound_of_plan(
    plan: PrivacyPlan, outcomes: list[tuple[int, int]], count: int, significance: float
) -> Bound:
    """The epsilon of the plan at the least noise that is refuted."""
    found = least_private_refuted(plan, outcomes, count, significance)
    if found is None:
        return Bound(0.0, 0, 0)
    noise, place = found
    epsilon = dataclasses.replace(plan, noise_multiplier=noise).epsilon()
    assert epsilon is not None
    return Bound(epsilon, *outcomes[place])


def _epsilon(
    guesses: int, correct: int, count: int, significance: float, delta: float, method: Method
) -> float:
    """The smallest epsilon that is not refuted by so many right guesses about `count` canaries.

    jax-privacy counts present and absent canaries above a threshold; told the right and the wrong
    guesses instead, it judges guesses of both kinds. It needs a canary of each kind: two more
    stand in, whose coins the mechanism never sees and about which nothing is guessed.
    """
    from jax_privacy import auditing

    right, wrong, unguessed = np.ones(correct), np.ones(guesses - correct), np.zeros(1)
    auditor: Any = auditing.CanaryScoreAuditor(
        np.concatenate([right, unguessed]),
        np.concatenate([wrong, np.zeros(count - guesses), unguessed]),
    )
    test = auditor.epsilon_one_run if method == "eps-delta" else auditor.epsilon_one_run_fdp
    return float(test(significance, delta, threshold_strategy=auditing.Explicit(0.5)))
