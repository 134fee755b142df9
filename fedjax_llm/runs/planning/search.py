"""Many candidates by simulation, a handful by pilots, one to the end (successive halving).

1. All candidates are simulated. Until a pilot says otherwise a local step is worth the same
   wherever it is taken, so that a candidate costs what it takes for each local step that lands.
2. `[plan] pilots` of them are trained for `pilot_rounds`: the cheapest, and then, axis by axis, the
   cheapest with a choice that none before it had, so that schedules, more local steps, fewer bits
   and smaller ranks are measured and not assumed.
3. What the pilots needed tells what each choice costs (`effects`); the best that this points to
   joins them.
4. The better half goes on for twice the rounds, and so on, but for those whose forecast is precise;
   the last goes on until its forecast is, or `max_pilot_rounds` are done.

arXiv 1603.06560 (Hyperband), section 3.1, for the halving.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.data import Corpus
from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.models import Model
from fedjax_llm.runs.events import Note, OnEvent
from fedjax_llm.runs.planning.candidates import apply
from fedjax_llm.runs.planning.curve import Curve, Reach, fit
from fedjax_llm.runs.planning.effects import effects
from fedjax_llm.runs.planning.forecast import Forecast, cost
from fedjax_llm.runs.planning.noise import noise_for
from fedjax_llm.runs.planning.pilot import Pilot
from fedjax_llm.runs.planning.screen import Costed, Screen
from fedjax_llm.runs.sections.plan import PlanSection
from fedjax_llm.runs.sections.schema import RunFile

# Noise that differs by less leaves a pilot's curve as it is.
_SAME_NOISE = 0.1
# The order in which pilots try something new.
_AXES = ("schedule", "local_steps", "bits", "rank", "balanced", "fragments")
# How far a first comparison looks ahead, in rounds of its pilots; the choice obeys [plan] reach.
_FAR = 64


@dataclass(eq=False)
class Trial:
    """A candidate on trial.

    Attributes:
        costed: with its costs by step.
        pilot: its training so far.
        curve: through its losses.
        noise: [privacy] noise_multiplier of the pilot; None without a unit.
        forecast: of the run; None while the target is out of sight.
    """

    costed: Costed
    pilot: Pilot
    curve: Curve
    noise: float | None
    forecast: Forecast | None = None


def spread(costed: Sequence[Costed], plan: PlanSection, count: int) -> list[Costed]:
    """The cheapest candidates by what a local step takes, each with a choice not seen before it.

    Args:
        costed: all candidates.
        plan: what is minimised.
        count: how many.
    """
    ordered = sorted(costed, key=lambda own: own.step[plan.minimise] / own.work)
    found = ordered[:1]
    for axis in itertools.islice(itertools.cycle(_AXES), count - 1):
        seen = {choice for own in found for choice in own.candidate.axes}
        rest = [own for own in ordered if own not in found]
        fresh = [own for own in rest if not seen.issuperset(own.candidate.axes)]
        here = [
            own for own in fresh if any(c not in seen for c in own.candidate.axes if c[0] == axis)
        ]
        found += (here or fresh or rest)[:1]
    return found


class Search:
    """The pilots of a plan.

    Args:
        run_file: what the plan begins with.
        plan: its section.
        screen: the simulations.
        base: the model.
        data: of each cloud.
        on_event: is told of every pilot.
    """

    def __init__(
        self,
        run_file: RunFile,
        plan: PlanSection,
        screen: Screen,
        base: Model,
        data: Sequence[Corpus],
        on_event: OnEvent,
    ) -> None:
        assert plan.target_loss is not None
        self._run_file, self._plan, self._screen = run_file, plan, screen
        self._base, self._data, self._on_event = base, data, on_event
        self._target = plan.target_loss

    def run(self, costed: Sequence[Costed]) -> list[Trial]:
        """All trials, the chosen one first.

        Raises:
            UserError: no candidate could be trained.
        """
        plan = self._plan
        trials = self._begin(spread(costed, plan, plan.pilots))
        if (more := self._promising(costed, trials)) is not None:
            trials += self._begin([more])
        left, rounds = self._ranked(trials), plan.pilot_rounds
        while len(left) > 1 and 2 * rounds <= plan.max_pilot_rounds:
            rounds *= 2
            left = left[: -(-len(left) // 2)]
            for trial in left:
                if not self._precise(trial):
                    self._extend(trial, rounds)
            left = self._ranked(left)
        best = left[0]
        while best.pilot.rounds < plan.max_pilot_rounds and not self._precise(best):
            if best.pilot.losses[-1] <= self._target:
                break
            self._extend(best, min(plan.max_pilot_rounds, best.pilot.rounds + plan.pilot_rounds))
        if best.forecast is not None and not _alike(best.noise, best.forecast.noise):
            self._extend(best, best.pilot.rounds)
        return [best, *(own for own in self._ranked(trials) if own is not best)]

    def reach(self, trial: Trial, horizon: int) -> Reach:
        """When a trial's run reaches the target."""
        return trial.curve.reach(self._target, horizon)

    def _begin(self, costed: Sequence[Costed]) -> list[Trial]:
        found, failure = [], None
        for own in costed:
            try:
                found.append(self._trial(own, None))
            except FedJaxError as error:
                failure = error
                self._on_event(Note(f"left out: {own.candidate.describe()}: {error}"))
        if not found:
            raise failure or UserError("[plan] leaves nothing to try; name more candidates")
        return found

    def _trial(self, costed: Costed, rounds: int | None) -> Trial:
        """A pilot from the start, at the noise of a run of so many rounds."""
        plan, candidate = self._plan, costed.candidate
        most = max(plan.max_pilot_rounds, rounds or _FAR * plan.pilot_rounds // 4)
        seen = self._screen.outlook(candidate, most)
        noise = noise_for(self._run_file, self._screen, candidate, most, seen).multiplier
        own = apply(self._screen.run_file, candidate, rounds=most, noise=noise)
        pilot = Pilot(own, self._base, self._data)
        # All of them, also beyond the target: a curve takes some rounds.
        pilot.extend(plan.pilot_rounds, -math.inf)
        trial = Trial(costed, pilot, _curve(pilot), noise)
        self._forecast(trial)
        self._tell(trial)
        return trial

    def _extend(self, trial: Trial, rounds: int) -> None:
        forecast = trial.forecast
        if forecast is not None and not _alike(trial.noise, forecast.noise):
            # The noise of the rounds that it has turned out to take: another curve.
            again = self._trial(trial.costed, forecast.high)
            trial.pilot, trial.noise = again.pilot, again.noise
        trial.pilot.extend(rounds, self._target)
        trial.curve = _curve(trial.pilot)
        self._forecast(trial)
        self._tell(trial)

    def _forecast(self, trial: Trial) -> None:
        candidate, done = trial.costed.candidate, trial.pilot.rounds
        found = self.reach(trial, _FAR * done)
        if math.isinf(found.rounds):
            trial.forecast = None
            return
        rounds, low = int(found.rounds), int(found.low)
        high = int(found.high) if math.isfinite(found.high) else 2 * rounds
        seen = self._screen.outlook(candidate, high)
        noise = noise_for(self._run_file, self._screen, candidate, high, seen)
        trial.forecast = Forecast.of(
            candidate, seen.totals(), rounds, low, high,
            epsilon=noise.epsilon(rounds), noise=noise.multiplier, pilot_rounds=done,
        )  # fmt: skip

    def _promising(self, costed: Sequence[Costed], trials: Sequence[Trial]) -> Costed | None:
        """The untried candidate that beats all trials by what they tell of its choices."""
        seen = [own for own in trials if own.forecast is not None]
        if len(seen) < 2:
            return None
        work = [own.forecast.rounds * own.costed.work for own in seen if own.forecast is not None]
        model = effects([own.costed.candidate for own in seen], work)
        tried = {own.costed.candidate for own in trials}
        rest = [own for own in costed if own.candidate not in tried]
        if not rest:
            return None

        def guess(own: Costed) -> float:
            return model.work(own.candidate) / own.work * own.step[self._plan.minimise]

        best = min(rest, key=guess)
        return (
            best if guess(best) < min(cost(own.forecast, self._plan)[1] for own in seen) else None
        )

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        def key(trial: Trial) -> tuple[int, float, float]:
            # With the target out of sight, by how fast the loss falls for what it takes.
            fallen = trial.pilot.losses[0] - trial.pilot.losses[-1]
            spent = trial.pilot.rounds * trial.costed.step[self._plan.minimise]
            return (*cost(trial.forecast, self._plan), -fallen / spent)

        return sorted(trials, key=key)

    def _precise(self, trial: Trial) -> bool:
        own, plan = trial.forecast, self._plan
        if own is None or own.rounds > plan.reach * trial.pilot.rounds:
            return False
        return (own.high - own.low) / 2 <= plan.precision * own.rounds

    def _tell(self, trial: Trial) -> None:
        one, own = trial.costed.candidate, trial.forecast
        when = f"rounds {own.low} to {own.high}" if own else "not in sight"
        self._on_event(
            Note(
                f"pilot: {one.describe()}, {one.local_steps} local steps, rank {one.rank}, "
                f"{one.bits or 'own'} bits{', balanced' if one.cloud_steps else ''}: loss "
                f"{trial.pilot.losses[-1]:.3f} after {trial.pilot.rounds} rounds, target {when}"
            )
        )


def _curve(pilot: Pilot) -> Curve:
    return fit(pilot.losses)


def _alike(noise: float | None, other: float | None) -> bool:
    return not noise or not other or abs(math.log(other / noise)) <= _SAME_NOISE
