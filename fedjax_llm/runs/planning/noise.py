"""The noise that keeps a planned run within its privacy budget: more rounds take more of it.

| [privacy] | the plan |
|---|---|
| unit none | has no epsilon |
| a unit, no budget | keeps the run file's noise and tells the epsilon of the planned rounds |
| a unit and a budget | takes the least noise that keeps all planned rounds within the budget |
"""

import dataclasses
import math
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm.federation.outlook import Outlook
from fedjax_llm.federation.spending import Spending
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.runs import build
from fedjax_llm.runs.planning.candidates import Candidate, apply
from fedjax_llm.runs.planning.screen import Screen
from fedjax_llm.runs.sections.schema import RunFile

# Digits of a noise multiplier in a run file; it is rounded up.
_DIGITS = 4


@dataclass(frozen=True)
class Noise:
    """What a run of so many rounds adds.

    Attributes:
        multiplier: [privacy] noise_multiplier; None without a unit.
        plan: for all rounds, at this noise.
        spending: of the run's steps.
    """

    multiplier: float | None
    plan: PrivacyPlan
    spending: Spending

    def epsilon(self, rounds: int) -> float | None:
        """After so many server steps; None without a unit or where none can be certified."""
        return self.plan.report(self.spending.rounds(rounds)).epsilon


def noise_for(
    run_file: RunFile, screen: Screen, candidate: Candidate, rounds: int, seen: Outlook
) -> Noise:
    """The noise of a candidate.

    Args:
        run_file: with the budget.
        screen: for the units of each client.
        candidate: of the plan.
        rounds: server steps that must stay within the budget.
        seen: its simulation over so many steps; where clouds do not wait it says how often each
            looks at its data.

    Raises:
        UserError: no noise keeps the budget.
    """
    alone = apply(screen.run_file, candidate, rounds=rounds)
    plan = build.plan(alone, screen.units, screen.base)
    spending = Spending(plan, seen.calendar, seen.roster.participants, seen.roster.cloud_K, rounds)
    if plan.unit == "none":
        return Noise(None, plan, spending)
    spent = spending.rounds(rounds)
    if spent != plan.rounds:
        planned = apply(screen.run_file, candidate, rounds=spent)
        plan = build.plan(planned, screen.units, screen.base)
    budget = run_file.privacy.budget
    if budget is not None:
        try:
            least = plan.noise_for(budget).noise_multiplier
        except UserError as error:
            raise UserError(
                f"{rounds} rounds of {candidate.local_steps} local steps do not fit [privacy] "
                f"budget {budget:g}: {error}"
            ) from None
        planned = apply(screen.run_file, candidate, rounds=spent, noise=_rounded_up(least))
        plan = build.plan(planned, screen.units, screen.base)
    spending = dataclasses.replace(spending, plan=plan)
    return Noise(plan.noise_multiplier, plan, spending)


def _rounded_up(value: float) -> float:
    """To a few digits, never below.

    >>> _rounded_up(0.77777777), _rounded_up(2.0)
    (0.7778, 2.0)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - _DIGITS)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{_DIGITS}g}")
