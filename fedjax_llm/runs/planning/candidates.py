"""The candidates of a plan: every way to run that [plan] leaves open, as changes of a run file.

| axis | what it changes |
|---|---|
| local_steps | [training] local_steps |
| rank | [adapter] rank; alpha stays in proportion, so that updates keep their scale |
| bits | [secure] bits, with a rotation, rounding at random and error feedback |
| schedule | [schedule]; the run file's own settings for the one that it names |
| balanced | each cloud's own local steps, so that all clouds take as long (`balance`) |
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedjax_llm.aggregation import RULES
from fedjax_llm.runs.sections.plan import PlanSection
from fedjax_llm.runs.sections.schedule import CompressionSection, ScheduleSection
from fedjax_llm.runs.sections.schema import RunFile

# Schedules with replicas are tried whole and in so many fragments.
FRAGMENTS = (1, 2)


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        local_steps: of a round, the most of any cloud.
        rank: of the adapter, the most of any cloud.
        bits: of a number on the wire; None as the run file has it.
        schedule: when the server waits for whom.
        balanced: whether slow clouds take fewer local steps.
        cloud_steps: of each cloud; () for `local_steps` everywhere.
        cloud_ranks: of each cloud; () for `rank` everywhere.
    """

    local_steps: int
    rank: int
    bits: int | None
    schedule: ScheduleSection
    balanced: bool = False
    cloud_steps: tuple[int, ...] = ()
    cloud_ranks: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[tuple[str, str], ...]:
        """What of it can make learning slower or faster, by name of the choice."""
        return (
            ("local_steps", str(self.local_steps)),
            ("rank", str(self.rank)),
            ("bits", str(self.bits)),
            ("schedule", self.schedule.name),
            ("fragments", str(self.schedule.fragments or 1)),
            ("balanced", str(self.balanced)),
        )

    def describe(self) -> str:
        """In a few words, for a table."""
        keys = self.schedule.model_dump(exclude_none=True, exclude={"name"})
        words: str = self.schedule.name
        if keys:
            words += f" ({', '.join(f'{name} {value:g}' for name, value in keys.items())})"
        return words


def apply(
    run_file: RunFile,
    candidate: Candidate,
    *,
    rounds: int | None = None,
    noise: float | None = None,
) -> RunFile:
    """The run file of a candidate, not checked again.

    Args:
        run_file: what the plan began with.
        candidate: what is changed.
        rounds: of the run; as it was if None.
        noise: [privacy] noise_multiplier; as it was if None.
    """
    adapter, training, secure = run_file.adapter, run_file.training, run_file.secure
    alpha = adapter.alpha * candidate.rank / adapter.rank
    clouds = []
    for place, cloud in enumerate(run_file.clouds):
        steps = candidate.cloud_steps[place] if candidate.cloud_steps else None
        rank = candidate.cloud_ranks[place] if candidate.cloud_ranks else None
        own = {
            "local_steps": None if steps == candidate.local_steps else steps,
            "rank": None if rank == candidate.rank else rank,
        }
        clouds.append(cloud.model_copy(update=own))
    changes = {
        "adapter": adapter.model_copy(update={"rank": candidate.rank, "alpha": alpha}),
        "training": training.model_copy(update={"local_steps": candidate.local_steps}),
        "schedule": candidate.schedule,
        "clouds": tuple(clouds),
    }
    if candidate.bits is not None:
        changes["secure"] = secure.model_copy(update={"bits": candidate.bits})
        if run_file.compression is None and compressible(run_file):
            changes["compression"] = _rounded(run_file)
    if rounds is not None:
        changes["rounds"] = rounds
    if noise is not None:
        changes["privacy"] = run_file.privacy.model_copy(update={"noise_multiplier": noise})
    return run_file.model_copy(update=changes)


def compressible(run_file: RunFile) -> bool:
    """Whether messages may be rotated and rounded; see `federation.compressor`."""
    rule = RULES[run_file.aggregation.rule]
    return not (
        rule.stages > 1
        or len(rule.phases) > 1
        or rule.needs_individual_messages
        or run_file.aggregation.combine != "mean"
        or run_file.training.scaffold
        or run_file.privacy.noise in ("discrete-gaussian", "skellam")
    )


def _rounded(run_file: RunFile) -> CompressionSection:
    privacy = run_file.privacy
    own = RULES[run_file.aggregation.rule]
    feedback = not own.new_coordinates and not (privacy.adaptive and privacy.unit == "client")
    central = privacy.unit == "client" and privacy.trust in (None, "central")
    return CompressionSection(
        codec="rotation",
        rounding="stochastic",
        error_feedback=feedback,
        broadcast="adapter" if central else "sum",
    )


def grid(run_file: RunFile, plan: PlanSection) -> Iterator[Candidate]:
    """All candidates, those without balance first; they may contradict other settings."""
    ranks = plan.ranks or tuple(sorted({max(1, run_file.adapter.rank // 2), run_file.adapter.rank}))
    steps = sorted({*plan.local_steps, run_file.training.local_steps})
    bits: Sequence[int | None] = (None, *sorted({*plan.bits}))
    if not compressible(run_file) and run_file.secure.sum == "plain":
        bits = (None,)  # whole messages of a plain sum take 4 bytes a number
    balanced = (False, True) if len(run_file.clouds) > 1 else (False,)
    ways = [way for name in plan.schedules for way in schedules(run_file, name)]
    for even, way, count, rank, width in itertools.product(balanced, ways, steps, ranks, bits):
        yield Candidate(count, rank, width, way, even)


def schedules(run_file: RunFile, name: str) -> Iterator[ScheduleSection]:
    """The settings of a schedule that are tried; a deadline gets its seconds later, from times."""
    if run_file.schedule.name == name:
        yield run_file.schedule
        return
    clouds = len(run_file.clouds)
    least = 1 if run_file.secure.sum == "plain" else (run_file.secure.minimum_clients or 2)
    quorums = sorted({max(least, clouds - 1), max(least, clouds // 2 + 1)} - {clouds})
    if name == "synchronous":
        yield ScheduleSection()
    elif name == "deadline":
        for quorum in quorums:
            yield ScheduleSection(name="deadline", quorum=quorum)
    elif name == "buffered":
        for size in quorums:
            yield ScheduleSection(name="buffered", size=size)
    elif name == "streaming":
        for fragments in FRAGMENTS:
            yield ScheduleSection(name="streaming", fragments=fragments, overlap=fragments > 1)
    else:
        for quorum, fragments in itertools.product(quorums or [clouds], FRAGMENTS):
            yield ScheduleSection(name="decoupled", quorum=quorum, fragments=fragments)
