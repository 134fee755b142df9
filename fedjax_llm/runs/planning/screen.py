"""What every candidate takes, by simulation alone: no keys, no programs, no training.

A candidate that contradicts the rest of the run file is left out; the reasons are kept for the case
that nothing is left. What is sent depends on rank, bits and fragments; it is worked out once for
all numbers of local steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import RULES
from fedjax_llm.data import Corpus
from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.federation.assembly import Assembly, Settings, assemble
from fedjax_llm.federation.keys import seed_key
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.outlook import Outlook, Totals, outlook
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.sums import SumMode
from fedjax_llm.models import Model
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.runs import build
from fedjax_llm.runs.planning.balance import Pace, balanced_steps, largest_ranks, training_bytes
from fedjax_llm.runs.planning.candidates import Candidate, apply, grid
from fedjax_llm.runs.sections.plan import Objective, PlanSection
from fedjax_llm.runs.sections.schedule import ScheduleSection
from fedjax_llm.runs.sections.schema import RunFile

# Server steps that are simulated to compare candidates; what a step takes is the mean of the latter
# half, when those that do not wait are past their start.
_STEPS = 24
# A deadline comes this much after the cloud that makes its quorum is through.
_SLACK = 1.05
# A smaller rank has to make a cloud's transfers shorter by this part to be taken.
_WORTH = 0.1


@dataclass(frozen=True, eq=False)
class Costed:
    """A candidate and what a server step of it takes in the long run.

    Attributes:
        candidate: with its clouds' own steps and ranks.
        step: seconds, dollars and bytes by name.
        work: local steps that land, the mean over the clouds.
    """

    candidate: Candidate
    step: dict[Objective, float]
    work: float


class Screen:
    """The simulations of a plan.

    Args:
        run_file: what the plan begins with.
        base: the model; shapes are enough.
        data: of each cloud.
    """

    def __init__(self, run_file: RunFile, base: Model, data: Sequence[Corpus]) -> None:
        # A budget would have the accountant search for every candidate.
        free = run_file.privacy.model_copy(update={"budget": None})
        self.run_file = run_file.model_copy(update={"privacy": free})
        self.base, self.data = base, data
        self.units = [rows for corpus in data for rows in corpus.client_rows]
        self.refusals: list[FedJaxError] = []
        self._participants = build.participants(run_file, base, data)
        self._layout = CohortLayout.over(len(self._participants))
        self._parts: dict[Candidate, Assembly] = {}
        self._modes: dict[int, SumMode] = {}
        self._paces: dict[tuple[int, int | None, tuple[int, ...]], list[Pace]] = {}

    def candidates(self, plan: PlanSection) -> list[Costed]:
        """All candidates of the grid that can run, with what a step of each takes."""
        found, seen = [], set[Candidate]()
        for one in grid(self.run_file, plan):
            ready = self._tried(lambda one=one: self._completed(one, plan))  # type: ignore[misc]
            if ready is None or dataclasses.replace(ready, balanced=False) in seen:
                continue
            seen.add(dataclasses.replace(ready, balanced=False))
            costed = self._tried(lambda ready=ready: self._costed(ready))  # type: ignore[misc]
            if costed is not None:
                found.append(costed)
        if not found:
            raise self.refusals[0]
        return found

    def outlook(self, candidate: Candidate, steps: int) -> Outlook:
        """The simulation of a candidate over so many server steps.

        Raises:
            UserError, Refused: as a federation of these settings.
        """
        run_file = apply(self.run_file, candidate, rounds=steps)
        roster_of = self._roster(run_file, candidate)
        settings = self._settings(run_file, candidate)
        roster = roster_of(settings.plan)
        key = dataclasses.replace(candidate, local_steps=1, cloud_steps=(), balanced=False)
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = assemble(self.base, settings, roster, self._layout)
        settings.schedule.check(len(roster.clouds))
        return outlook(
            self.base,
            settings,
            parts,
            roster,
            steps=steps,
            length=run_file.training.sequence_length,
            seed=run_file.seed,
        )

    def totals(self, candidate: Candidate, steps: int) -> Totals:
        """What so many server steps of a candidate take."""
        return self.outlook(candidate, steps).totals()

    def _settings(self, run_file: RunFile, candidate: Candidate) -> Settings:
        mode = self._modes.get(candidate.rank)
        if mode is None:
            mode = self._modes[candidate.rank] = build.sum_mode(run_file, self.base)
        return Settings(
            lora=build.lora(run_file),
            training=build.local_training(run_file, self.base),
            rule=build.rule(run_file),
            plan=build.plan(run_file, self.units, self.base),
            sum_mode=mode,
            schedule=build.schedule(run_file),
            compression=build.compression(run_file),
            combine=build.combination(run_file),
            update_bound=run_file.secure.update_bound,
            value_bits=run_file.secure.bits,
            attackers=build.attackers(run_file),
            dtype=jnp.dtype(run_file.model.dtype),
            remat=run_file.training.remat,
        )

    def _roster(self, run_file: RunFile, candidate: Candidate) -> Callable[[PrivacyPlan], Roster]:
        place = {cloud.name: k for k, cloud in enumerate(run_file.clouds)}
        clients = [
            dataclasses.replace(
                own,
                local_steps=run_file.clouds[place[own.cloud.name]].local_steps,
                rank=run_file.clouds[place[own.cloud.name]].rank,
            )
            for own in self._participants
        ]
        training = build.local_training(run_file, self.base)
        return lambda plan: Roster(
            clients,
            self._layout,
            training,
            plan,
            build.weights(run_file, self.data),
            candidate.rank,
            seed_key(run_file.seed),
        )

    def _completed(self, candidate: Candidate, plan: PlanSection) -> Candidate:
        """The candidate with its clouds' ranks and steps, and its deadline."""
        ranks = self._ranks(candidate, plan)
        one = dataclasses.replace(candidate, cloud_ranks=ranks)
        paces = self._pace(one)
        if candidate.balanced:
            one, paces = self._lighter(one, paces, plan)
            steps = balanced_steps(paces, candidate.local_steps)
            if set(steps) != {candidate.local_steps}:
                one = dataclasses.replace(one, cloud_steps=steps)
        schedule = one.schedule
        if schedule.name == "deadline" and schedule.seconds is None:
            steps = one.cloud_steps or (one.local_steps,) * len(paces)
            spans = sorted(pace.seconds(own) for pace, own in zip(paces, steps, strict=True))
            assert schedule.quorum is not None
            seconds = float(f"{_SLACK * spans[schedule.quorum - 1]:.3g}")
            own_schedule = schedule.model_copy(update={"seconds": seconds})
            one = dataclasses.replace(one, schedule=own_schedule)
        return one

    def _ranks(self, candidate: Candidate, plan: PlanSection) -> tuple[int, ...]:
        """Ranks by cloud as memory allows; () where all have the same."""
        training, config = self.run_file.training, self.base.config
        smaller = [rank for rank in self._choices(plan) if rank <= candidate.rank]
        bytes_of = {
            rank: training_bytes(
                config,
                self.run_file.adapter.targets,
                rank,
                value_bytes=jnp.dtype(self.run_file.model.dtype).itemsize,
                rows=training.microbatch,
                length=training.sequence_length,
                remat=training.remat,
            )
            for rank in smaller
        }
        clouds = list(dict.fromkeys(own.cloud for own in self._participants))
        found = largest_ranks(clouds, smaller, bytes_of)
        if set(found) == {candidate.rank}:
            return ()
        if not RULES[self.run_file.aggregation.rule].facts.ranks:
            raise UserError(
                f"rank {candidate.rank} does not fit every cloud's memory, and rule "
                f"{self.run_file.aggregation.rule!r} takes one rank for all; name smaller ranks"
            )
        return found

    def _choices(self, plan: PlanSection) -> list[int]:
        own = self.run_file.adapter.rank
        return sorted(plan.ranks or {max(1, own // 2), own})

    def _lighter(
        self, one: Candidate, paces: list[Pace], plan: PlanSection
    ) -> tuple[Candidate, list[Pace]]:
        """Smaller ranks for clouds whose transfers alone take longer than the fastest's round."""
        smallest = min(self._choices(plan))
        whole = min(pace.seconds(one.local_steps) for pace in paces)
        slow = [pace.transfers + pace.step > whole for pace in paces]
        rule = RULES[self.run_file.aggregation.rule]
        if not any(slow) or all(slow) or smallest == one.rank or not rule.facts.ranks:
            return one, paces
        now = one.cloud_ranks or (one.rank,) * len(paces)
        ranks = tuple(smallest if late else own for late, own in zip(slow, now, strict=True))
        lighter = dataclasses.replace(one, cloud_ranks=ranks)
        found = self._pace(lighter)
        gains = any(
            late and new.transfers < (1 - _WORTH) * old.transfers
            for late, new, old in zip(slow, found, paces, strict=True)
        )
        return (lighter, found) if gains else (one, paces)

    def _pace(self, candidate: Candidate) -> list[Pace]:
        """What transfers and a local step of each cloud take, from one synchronous round."""
        key = (candidate.rank, candidate.bits, candidate.cloud_ranks)
        if key not in self._paces:
            alone = dataclasses.replace(
                candidate, local_steps=1, schedule=ScheduleSection(), balanced=False, cloud_steps=()
            )
            table_M = self.outlook(alone, 4).calendar.timeline.table_M
            found = []
            for cloud in range(len(self.run_file.clouds)):
                rows = table_M[(table_M["cloud"] == cloud) & (table_M["lands"] > 0)]
                moved = rows["received"] - rows["start"] + rows["arrived"] - rows["trained"]
                step = rows["trained"] - rows["received"]
                found.append(Pace(float(np.mean(moved)), float(np.mean(step))))
            self._paces[key] = found
        return self._paces[key]

    def _costed(self, candidate: Candidate) -> Costed:
        totals, half = self.totals(candidate, _STEPS), _STEPS // 2

        def mean(array_N: np.ndarray) -> float:
            return float(array_N[-1] - array_N[half - 1]) / (_STEPS - half)

        step: dict[Objective, float] = {
            "seconds": mean(totals.seconds_N),
            "dollars": mean(totals.dollars_N),
            "bytes": mean(totals.bytes_N),
        }
        return Costed(candidate, step, mean(totals.work_N))

    def _tried[T](self, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except FedJaxError as error:
            self.refusals.append(error)
            return None
