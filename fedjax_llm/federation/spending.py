"""What a run has spent of its privacy plan after so many server steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.errors import Refused
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.tables import Participant
from fedjax_llm.privacy import PrivacyPlan


@dataclass(frozen=True, eq=False)
class Spending:
    """Translates server steps into rounds and local steps of the plan.

    Where all clouds wait for each other a step is a round. Elsewhere, with units `example` and
    `user`, what counts is how often a cloud has begun to look at its data, which the timeline says;
    with unit `client` it is the sums that were opened, which are the steps.

    Attributes:
        plan: of the run.
        calendar: of at least `steps` server steps.
        participants: the clients.
        cloud_K: the cloud of each.
        steps: server steps of the run.
    """

    plan: PrivacyPlan
    calendar: Calendar
    participants: Sequence[Participant]
    cloud_K: Sequence[int]
    steps: int

    def rounds(self, step: int) -> int:
        """Rounds of the plan that are spent after a step: those of the cloud with the most."""
        if self.plan.unit not in ("example", "user") or self.calendar.schedule.timely:
            return step
        return int(self.calendar.cycles(step).max())

    def check(self, step: int) -> None:
        """Refuses a step that the plan does not account for.

        Raises:
            Refused: more rounds would be spent after it than the plan and its budget allow.
        """
        if self.plan.unit == "none":
            return
        allowed = self.plan.allowed_rounds
        if self.rounds(step) > allowed:
            within = "" if self.plan.budget is None else f" within epsilon {self.plan.budget:g}"
            raise Refused(
                f"round {step}: the privacy plan accounts for {allowed} rounds{within}; plan more, "
                "at a larger epsilon"
            )

    @property
    def allowed_steps(self) -> int:
        """Server steps of the run that the plan and its budget allow."""
        if self.plan.unit == "none":
            return max(self.steps, self.plan.rounds)
        allowed = self.plan.allowed_rounds
        if self.calendar.schedule.timely:
            return allowed
        return next(step for step in range(self.steps, -1, -1) if self.rounds(step) <= allowed)

    def local_steps(self, step: int) -> list[int]:
        """Local steps that each client has taken on its data."""
        most = self.plan.sampler.steps_per_round
        if self.calendar.schedule.timely:
            rounds_K = [
                sum(number not in own.offline_rounds for number in range(1, step + 1))
                for own in self.participants
            ]
        else:
            cycles_C = self.calendar.cycles(step)
            rounds_K = [int(cycles_C[cloud]) for cloud in self.cloud_K]
        return [
            rounds * min(most, own.local_steps or most)
            for rounds, own in zip(rounds_K, self.participants, strict=True)
        ]
