"""[plan]: what `fedjax-llm plan` may choose among, what it aims for, and what it has forecast."""

from typing import Annotated, Literal

from pydantic import Field

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.schedule import ScheduleName
from fedjax_llm.runs.sections.types import Count, NotNegative, Positive, Section

Objective = Literal["seconds", "dollars", "bytes"]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Bits = Annotated[int, Field(ge=4, le=16)]


class ForecastSection(Section):
    """[plan.forecast]: what the plan that wrote this run file expects of its run.

    `rounds`, `seconds` (virtual), `bytes` (both ways) and `dollars` are those until the target is
    reached; `rounds_low` and `rounds_high` bound 80 percent of what the learning curve allows.
    `epsilon` is that of [privacy] for `rounds`.
    """

    rounds: Count
    rounds_low: Count
    rounds_high: Count
    seconds: NotNegative
    bytes: NotNegative
    dollars: NotNegative
    epsilon: NotNegative | None = None


class PlanSection(Section):
    """[plan]: a target, what to minimise on the way to it, budgets, and what there is to choose.

    | key | what |
    |---|---|
    | target_loss | mean held-out loss of the clouds in nats; pilots measure how fast it falls |
    | target_tokens | positions to train on instead: no pilot, quality is not looked at |
    | minimise | virtual seconds, dollars, or bytes both ways |
    | max_seconds, max_dollars, max_bytes | budgets |
    | local_steps, ranks, bits, schedules | candidates; what [training], [adapter], [secure] and \
[schedule] say is one of them |
    | pilots | how many candidates are trained for a few rounds |
    | pilot_rounds | of each; the better half goes on for as many again, and so on |
    | max_pilot_rounds | of the best one, which goes on until its forecast is precise |
    | precision | half the width of a precise forecast's interval, over its rounds |
    | reach | how many times the rounds of its pilot a forecast may look ahead |

    `bits` of 16 or fewer go with a rotation, rounding at random and error feedback, unless
    [compression] says otherwise, where the rule takes a compression at all.
    """

    target_loss: Positive | None = None
    target_tokens: Count | None = None
    minimise: Objective = "seconds"
    max_seconds: Positive | None = None
    max_dollars: Positive | None = None
    max_bytes: Positive | None = None
    local_steps: Counts = (1, 2, 4, 8)
    ranks: Counts | None = None
    bits: Annotated[tuple[Bits, ...], Field(strict=False)] = (8, 16)
    schedules: Annotated[tuple[ScheduleName, ...], Field(strict=False, min_length=1)] = (
        "synchronous",
        "deadline",
        "buffered",
        "streaming",
        "decoupled",
    )
    pilots: Annotated[int, Field(ge=1, le=64)] = 6
    pilot_rounds: Annotated[int, Field(ge=3)] = 4
    max_pilot_rounds: Annotated[int, Field(ge=3)] = 32
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.2
    reach: Annotated[float, Field(ge=1, le=100)] = 10.0
    forecast: ForecastSection | None = None


def check_plan(plan: PlanSection | None, target_loss: float | None, epsilon: bool) -> None:
    """Refuses a plan without a target, with two, or whose run would stop somewhere else.

    Args:
      plan: the section, if there is one.
      target_loss: [evaluation] target_loss.
      epsilon: whether [privacy] has a unit.
    """
    if plan is None:
        return
    if (plan.target_loss is None) == (plan.target_tokens is None):
        given = "neither" if plan.target_loss is None else "both"
        raise problem(
            ("plan",), f"takes either target_loss or target_tokens, {given} given", got=False
        )
    if plan.max_pilot_rounds < plan.pilot_rounds:
        raise problem(
            ("plan", "max_pilot_rounds"), f"must be at least pilot_rounds, {plan.pilot_rounds}"
        )
    if target_loss is not None and target_loss != plan.target_loss:
        raise problem(
            ("evaluation", "target_loss"),
            "is not that of [plan]; remove it, the plan sets it",
        )
    if plan.forecast is not None and plan.forecast.epsilon is not None and not epsilon:
        raise problem(
            ("plan", "forecast", "epsilon"),
            "goes with a [privacy] unit; remove it",
            got=False,
        )
