"""`fedjax-llm plan`: from a run file with [plan] to the run that reaches its target for the least.

| target | how many rounds |
|---|---|
| target_loss | pilots are trained, and a learning curve is fitted to each (`search`, `curve`) |
| target_tokens | as many as it takes to train on so many positions; nothing is trained |

Time, bytes and money of those rounds come from the simulation that the run itself uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.data import Corpus
from fedjax_llm.errors import UserError
from fedjax_llm.models import Model
from fedjax_llm.runs import build
from fedjax_llm.runs.events import Note, OnEvent, ignore
from fedjax_llm.runs.planning.candidates import apply
from fedjax_llm.runs.planning.forecast import MEASURES, Forecast, cost, over_budget
from fedjax_llm.runs.planning.noise import noise_for
from fedjax_llm.runs.planning.screen import Costed, Screen
from fedjax_llm.runs.planning.search import Search, Trial
from fedjax_llm.runs.sections.plan import PlanSection
from fedjax_llm.runs.sections.schema import RunFile

# With a target of tokens so many of the cheapest are simulated to their end.
_SHOWN = 12


@dataclass(frozen=True)
class Planned:
    """What a plan comes to.

    Attributes:
        run_file: of the choice, with its forecast in [plan.forecast].
        forecasts: of the best candidates, the choice first.
        candidates: how many were simulated.
    """

    run_file: RunFile
    forecasts: tuple[Forecast, ...]
    candidates: int

    @property
    def chosen(self) -> Forecast:
        """The choice."""
        return self.forecasts[0]


def make(run_file: RunFile, *, on_event: OnEvent = ignore) -> Planned:
    """Chooses how to run.

    Args:
        run_file: with a section [plan].
        on_event: is told of every pilot.

    Raises:
        UserError: no [plan]; a target out of reach, or too far ahead to be forecast; budgets that
            no candidate keeps.
        Refused: as a federation.
    """
    plan = run_file.plan
    if plan is None:
        raise UserError(
            "the run file has no [plan]; add one with target_loss or target_tokens, as "
            "[plan] target_loss = 3.2"
        )
    base = build.model(run_file, on_event)
    data = build.corpora(run_file, base, on_event)
    screen = Screen(run_file, base, data)
    costed = screen.candidates(plan)
    on_event(Note(f"{len(costed)} candidates simulated, {len(screen.refusals)} left out"))
    if plan.target_tokens is not None:
        forecasts = _by_tokens(run_file, plan, screen, costed, plan.target_tokens)
    else:
        forecasts = _by_loss(run_file, plan, screen, costed, base, data, on_event)
    _check_budgets(forecasts, plan)
    return Planned(_chosen(run_file, plan, forecasts[0]), tuple(forecasts), len(costed))


def _by_tokens(
    run_file: RunFile, plan: PlanSection, screen: Screen, costed: Sequence[Costed], tokens: int
) -> list[Forecast]:
    """The cheapest candidates for so many positions, best first."""
    ordered = sorted(costed, key=lambda own: own.step[plan.minimise] / own.work)
    found = []
    for own in ordered[:_SHOWN]:
        steps = 24
        while (totals := screen.totals(own.candidate, steps)).tokens_N[-1] < tokens:
            steps = max(2 * steps, math.ceil(1.05 * steps * tokens / totals.tokens_N[-1]))
        rounds = int((totals.tokens_N < tokens).sum()) + 1
        # Once more with its own end: what is under way then depends on where that is.
        seen = screen.outlook(own.candidate, rounds)
        noise = noise_for(run_file, screen, own.candidate, rounds, seen)
        found.append(
            Forecast.of(
                own.candidate,
                seen.totals(),
                rounds,
                rounds,
                rounds,
                epsilon=noise.epsilon(rounds),
                noise=noise.multiplier,
            )
        )
    return sorted(found, key=lambda own: cost(own, plan))


def _by_loss(
    run_file: RunFile,
    plan: PlanSection,
    screen: Screen,
    costed: Sequence[Costed],
    base: Model,
    data: Sequence[Corpus],
    on_event: OnEvent,
) -> list[Forecast]:
    """The candidates that had a pilot, the choice first."""
    trials = Search(run_file, plan, screen, base, data, on_event).run(costed)
    best = trials[0]
    _check_reach(best, plan)
    return [own.forecast for own in trials if own.forecast is not None]


def _check_reach(best: Trial, plan: PlanSection) -> None:
    """Refuses a target that is not in sight."""
    target, pilot, own = plan.target_loss, best.pilot, best.forecast
    assert target is not None
    if pilot.losses[0] <= target:
        raise UserError(
            f"[plan] target_loss {target:g} is reached before training, whose loss is "
            f"{pilot.losses[0]:.4g}; lower it"
        )
    if own is None:
        raise UserError(
            f"[plan] target_loss {target:g} is out of sight: after {pilot.rounds} rounds the best "
            f"pilot is at {pilot.losses[-1]:.4g} and its curve levels off at about "
            f"{best.curve.floor:.3g}; raise it, or max_pilot_rounds"
        )
    if own.rounds > plan.reach * pilot.rounds:
        raise UserError(
            f"[plan] target_loss {target:g} may take {own.rounds} rounds, more than {plan.reach:g} "
            f"times the {pilot.rounds} of its pilot, which is too far to forecast; raise "
            "max_pilot_rounds, or target_loss"
        )


def _check_budgets(forecasts: Sequence[Forecast], plan: PlanSection) -> None:
    """Refuses budgets that no candidate keeps, with the least that each takes."""
    broken = over_budget(forecasts[0], plan)
    if not broken:
        return
    words = [
        f"max_{name} = {_number(getattr(plan, f'max_{name}'))} (the least is "
        f"{_number(min(float(getattr(own, name)) for own in forecasts))})"
        for name in MEASURES
        if name in broken
    ]
    raise UserError(
        f"no candidate reaches the target within [plan] {' and '.join(words)}; raise the "
        "budget, or aim lower"
    )


def _number(value: float) -> str:
    """Whole where it is large.

    >>> _number(11663.2), _number(0.0123456)
    ('11663', '0.01235')
    """
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _chosen(run_file: RunFile, plan: PlanSection, best: Forecast) -> RunFile:
    """The run file of the choice: it ends at the target, or after the last round forecast."""
    found = apply(run_file, best.candidate, rounds=best.high, noise=best.noise)
    stop = {"target_loss": plan.target_loss}
    if plan.target_loss is not None:
        stop["every_rounds"] = 1
    changes = {
        "plan": plan.model_copy(update={"forecast": best.section()}),
        "evaluation": found.evaluation.model_copy(update=stop),
    }
    # Validated again: what is written must load.
    return RunFile.model_validate(found.model_copy(update=changes).model_dump())
