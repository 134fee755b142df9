"""A pilot: the first rounds of a candidate's run, really trained, on the user's model and data.

Messages are added on the devices, to the same bytes as under any secure sum and in the virtual
time of the run's own sum, so that no keys are made. With the same seed, rows and noise the pilot's
rounds are the run's first ones, bit for bit, and what is measured on the held-out rows of the run
is what the run will stop by.

Privacy: the losses of a pilot are those of real rows. No epsilon covers them, nor the choice and
the forecast that follow from them; whoever must not learn such losses must not see a plan.
"""

from collections.abc import Sequence

from fedjax_llm.data import Corpus
from fedjax_llm.models import Model
from fedjax_llm.runs import build
from fedjax_llm.runs.sections.schema import RunFile


class Pilot:
    """A run that goes on for as many rounds as it is asked for.

    Args:
        run_file: of the candidate; its rounds bound those of the pilot.
        base: the model.
        data: of each cloud.
    """

    def __init__(self, run_file: RunFile, base: Model, data: Sequence[Corpus]) -> None:
        evaluation = run_file.evaluation.model_copy(update={"aggregation_error": False})
        self.run_file = run_file.model_copy(update={"evaluation": evaluation})
        self._federation = build.federation(self.run_file, base, list(data), trial=True)
        self._state = self._federation.init()
        self.losses = [self._loss()]

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return len(self.losses) - 1

    def extend(self, rounds: int, target: float) -> None:
        """Trains until there are so many rounds in all, or the target is reached.

        Args:
            rounds: in all.
            target: held-out loss in nats, the mean over the clouds.
        """
        while self.rounds < min(rounds, self.run_file.rounds):
            if self.rounds > 0 and self.losses[-1] <= target:
                return
            self._state, _ = self._federation.run_round(self._state)
            self.losses.append(self._loss())

    def _loss(self) -> float:
        losses = self._federation.evaluate(self._state)
        return sum(losses.values()) / len(losses)
