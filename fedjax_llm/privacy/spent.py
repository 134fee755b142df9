"""What a mechanism costs after some steps, as the accountant counts it."""

from typing import Any

from . import accounting
from .mechanism import Mechanism


def gaussians(
    mechanism: Mechanism, rate: float, steps: int, taken: int | None = None
) -> tuple[float, float, int]:
    """Rate, noise multiplier and number of the Gaussian mechanisms that the steps amount to.

    Args:
        mechanism: of the run.
        rate: of a unit in its turn.
        steps: of the run so far.
        taken: steps that the unit's cloud took part in, where those are fewer. They may all be
            turns of the same unit.
    """
    period = mechanism.sampler.period
    if mechanism.correlation is None or mechanism.correlation.bands <= period:
        turns = mechanism.sampler.turns(steps)
        return rate, mechanism.noise_multiplier, turns if taken is None else min(turns, taken)
    # Sampling at random only takes participations away (the guarantee holds for each outcome of
    # it); that it also hides is certified for no noise that reaches the unit's next turn.
    return 1.0, mechanism.noise_multiplier / mechanism.correlation.sensitivity(period, steps), 1


def event(mechanism: Mechanism, rate: float, steps: int) -> Any:
    """The `dp_accounting.DpEvent` of some steps of a mechanism, for a unit of this rate."""
    import dp_accounting as dp

    if steps == 0:
        return dp.NoOpDpEvent()
    if mechanism.integer is not None:
        return mechanism.integer.event(mechanism.noise_multiplier, steps)
    rate, noise, count = gaussians(mechanism, rate, steps)
    step: Any = dp.GaussianDpEvent(noise)
    if rate < 1:
        step = dp.PoissonSampledDpEvent(rate, step)
    return dp.SelfComposedDpEvent(step, count)


def epsilon(
    mechanism: Mechanism,
    rate: float,
    steps: int,
    interval: float | None = None,
    taken: int | None = None,
) -> float:
    """Epsilon at the mechanism's delta after some steps; inf where nothing finite is certified.

    That is where there is too little noise; a delta below what the accountant of samples can
    resolve is one for which sampling is not counted.

    Args:
        mechanism: of the run.
        rate: of a unit in its turn.
        steps: of the run so far.
        interval: of the accountant's grid, as `accounting.epsilon` takes it.
        taken: as in `gaussians`.
    """
    if steps == 0 or taken == 0:
        return 0.0
    if mechanism.integer is not None:
        count = steps if taken is None else taken
        return mechanism.integer.epsilon(mechanism.noise_multiplier, count, mechanism.delta)
    replace = mechanism.adjacency == "replace"
    sampled, noise, count = gaussians(mechanism, rate, steps, taken)
    # Whoever takes part in every turn loses most, and that is counted exactly, where sampling is
    # counted a little too high: a cloud of a lower rate would be told more than one of a higher.
    return min(
        accounting.epsilon(each, noise, count, mechanism.delta, interval, replace=replace)
        for each in {sampled, 1.0}
    )


def why_none(mechanism: Mechanism) -> str:
    """Why no epsilon is shown where none that is finite is certified."""
    asked = mechanism.noise_multiplier
    if mechanism.integer is not None:
        return (
            f"integer noise of {mechanism.integer.stddev(asked):g} steps certifies "
            "none; use more noise, or finer fixed point (more bits)"
        )
    _, noise, _ = gaussians(mechanism, max(mechanism.sampler.rates), mechanism.steps)
    if noise == asked:
        return (
            f"the noise multiplier {noise:g} is below {accounting.MIN_NOISE_MULTIPLIER:g}, "
            "too small to account for"
        )
    return (
        f"the noise multiplier {asked:g}, that is {noise:.3g} over what a unit can move, is below "
        f"{accounting.MIN_NOISE_MULTIPLIER:g}, too small to account for"
    )
