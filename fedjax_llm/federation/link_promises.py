"""What schedules and compression need of the rest of a run; a difference is refused before it."""

from typing import NamedTuple

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.clouds.schedules import Deadline, Decoupled, FedBuff, Schedule, Streaming
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.compressor import Compression
from fedjax_llm.federation.promises import Combination
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import Drift


class Promise(NamedTuple):
    """What a privacy plan says that schedules and compression have to know.

    Attributes:
        unit: whose participation is hidden.
        sampled: whether units take part at random.
        turns: whether a unit's turn comes in some steps only.
        correlated: whether the noise of different steps hangs together.
        adaptive: whether the clip norm moves.
        integer: whether clients add integer noise.
        central: whether the server adds the noise.
    """

    unit: str
    sampled: bool
    turns: bool
    correlated: bool
    adaptive: bool
    integer: bool
    central: bool

    @classmethod
    def of(cls, plan: PrivacyPlan) -> "Promise":
        """Of a plan."""
        return cls(
            plan.unit,
            plan.sampler.kind != "full",
            plan.sampler.period > 1,
            plan.correlation is not None,
            plan.adaptive is not None,
            plan.integer is not None,
            plan.unit == "client" and plan.trust == "central",
        )


def check_schedule(
    schedule: Schedule,
    promise: Promise,
    *,
    rule: AggregationRule,
    opens: int,
    clouds: int,
    drift: Drift,
    combine: Combination | None,
    by_loss: bool,
    normalises: bool,
    attacked: bool,
    offline: bool,
) -> None:
    """Refuses a schedule whose messages would not mean what the rest of the run takes them for.

    Formal guarantee: for the schedules that pass, the plan's epsilon holds. With unit `example` or
    `user` every local step is a mechanism by itself, whenever its message lands, and `check_cycles`
    compares what a cloud begins with what the plan counts. With unit `client` a client's message
    enters the sum of a step at most once and at most as long as the clip norm, weights by age and
    by local steps being public and at most 1; all that decides who lands is public too, so that no
    amplification by sampling is claimed where clouds do not wait for each other.

    | schedule | result |
    |---|---|
    | waits, every cycle from the global model | whatever the rest allows |
    | otherwise: rule of several phases, stages or coordinates | UserError |
    | otherwise: rule or combination that reads messages, weights by result | UserError |
    | otherwise: control variates, FedNova, attackers, offline rounds | UserError |
    | otherwise: unit `client` sampled at random, or by turns | Refused |
    | otherwise: correlated noise, adaptive clip norm | Refused |
    | a quorum below what an encrypted sum opens | UserError |

    Args:
        schedule: when the server waits for whom.
        promise: what the plan says.
        rule: what is trained and sent.
        opens: fewest messages of a sum that is opened between the clouds; 0 on the devices.
        clouds: how many there are.
        drift: of local training.
        combine: how messages are combined; None is the mean.
        by_loss: whether weights follow from losses.
        normalises: whether FedNova weighs local steps.
        attacked: whether a simulation has malicious clients.
        offline: whether clouds have rounds in which they cannot be reached.
    """
    name = schedule.name
    fewest = fewest_of(schedule, clouds)
    if fewest < opens:
        raise UserError(
            f"schedule {name!r} makes a step of {fewest} messages, and no sum of fewer than "
            f"{opens} is opened; raise its quorum or size to that"
        )
    if schedule.timely:
        return
    reasons = {
        "a rule of one phase and one sum, in coordinates that stay": len(rule.phases) > 1
        or rule.stages > 1
        or rule.new_coordinates
        or rule.plain_steps_only,
        "a rule and a combination that add messages": rule.needs_individual_messages
        or combine is not None
        or bool(rule.kept),
        "weights that are known beforehand": by_loss or rule.weighs_by_result or normalises,
        "no control variates": drift.control,
        "no attackers": attacked,
        "availability instead of offline_rounds": offline,
    }
    for needed, broken in reasons.items():
        if broken:
            raise UserError(
                f"with schedule {name!r} messages of several versions make a step, which takes "
                f"{needed}; change that, or use schedule synchronous or deadline"
            )
    if promise.unit == "client" and (promise.sampled or promise.turns):
        raise Refused(
            f"with schedule {name!r} clouds take part when they are through, not when a sample "
            'says so: no amplification holds; use sampling "full" with unit client'
        )
    if promise.correlated or promise.adaptive:
        what = "correlated noise" if promise.correlated else "an adaptive clip norm"
        raise Refused(
            f"{what} belongs to the steps of one order, and with schedule {name!r} messages of "
            "several versions land together; use independent noise and a fixed clip norm"
        )
    if promise.unit in ("example", "user") and promise.turns:
        raise Refused(
            f"turns are counted by rounds, which schedule {name!r} does not have; leave them out"
        )


class MoreCycles(Refused):
    """A cloud begins more cycles than the plan counts; `cycles` says how many."""

    def __init__(self, cycles: int, steps: int, schedule: str, planned: int) -> None:
        super().__init__(
            f"a cloud begins {cycles} cycles in the {steps} steps of schedule {schedule!r}, and "
            f"the plan counts {planned}; plan for {cycles} rounds"
        )
        self.cycles = cycles


def check_cycles(plan: PrivacyPlan, calendar: Calendar, steps: int) -> None:
    """Refuses a timeline in which a cloud looks at its data more often than the plan counts.

    Args:
        plan: of units `example` and `user`; others count steps, not cycles.
        calendar: of the run.
        steps: server steps of the run.

    Raises:
        MoreCycles: naming the number of rounds to plan for.
    """
    if plan.unit not in ("example", "user") or calendar.schedule.timely:
        return
    most = int(calendar.cycles(steps).max())
    if most > plan.rounds:
        raise MoreCycles(most, steps, calendar.schedule.name, plan.rounds)


def in_fragments(compression: Compression | None, schedule: Schedule) -> Compression | None:
    """The compression of a run whose schedule may let the layers travel in parts."""
    if isinstance(schedule, Streaming | Decoupled) and schedule.fragments > 1:
        return (compression or Compression()).in_turns(schedule.fragments)
    return compression


def fewest_of(schedule: Schedule, clouds: int) -> int:
    """The fewest messages that a schedule makes a step of.

    >>> fewest_of(Deadline(5.0, quorum=2), 5), fewest_of(FedBuff(3), 5)
    (2, 3)
    """
    if isinstance(schedule, Deadline | Decoupled):
        return schedule.quorum
    return schedule.size if isinstance(schedule, FedBuff) else clouds


def check_compression(
    compression: Compression,
    promise: Promise,
    *,
    rule: AggregationRule,
    combined: bool,
    control: bool,
) -> None:
    """Refuses a compression whose messages would not mean what the rest of the run takes them for.

    | compression | result |
    |---|---|
    | rule of several sums or phases, or that reads messages | UserError |
    | robust or normalised mean | UserError |
    | control variates | UserError |
    | error feedback with a rule that writes new coordinates each round | UserError |
    | error feedback with an adaptive clip norm | UserError |
    | codec of two sums with unit `client`, whose plan counts one | Refused |
    | integer noise, which is calibrated to whole messages | Refused |
    | correlated noise of the server, unless every number means the same in every round | Refused |
    | the opened sum sent back, before the server has added its noise | Refused |

    Args:
        compression: the settings.
        promise: what the plan says.
        rule: what is trained and sent.
        combined: whether messages are combined otherwise than by their mean.
        control: whether control variates travel with them.
    """
    name = compression.codec.name
    if rule.stages > 1 or len(rule.phases) > 1 or rule.needs_individual_messages or combined:
        raise UserError(
            f"compression {name!r} needs a rule that adds one message of the same shape in every "
            f"round, and rule {rule.name!r} or its combination does not; leave compression out, or "
            "use a rule such as ffa"
        )
    if control:
        raise UserError(
            "control variates travel with the messages and are not small; leave out scaffold, or "
            f"compression {name!r}"
        )
    feeds_back = compression.error_feedback
    if feeds_back and rule.new_coordinates:
        raise UserError(
            f"rule {rule.name!r} writes the adapter in new coordinates each round, where what was "
            "left out before means nothing; switch error feedback off"
        )
    if feeds_back and promise.adaptive and promise.unit == "client":
        raise UserError(
            "error feedback keeps lengths that an adaptive clip norm changes from round to round; "
            "switch one of them off"
        )
    if promise.unit == "client" and compression.codec.stages > 1:
        raise Refused(
            f"compression {name!r} opens {compression.codec.stages} sums a round and the plan of "
            "unit 'client' accounts for one; use another codec, or unit example"
        )
    if promise.integer:
        raise Refused(
            f"integer noise is calibrated to messages that are sent whole; leave out compression "
            f"{name!r}, or use noise gaussian"
        )
    if promise.correlated and promise.unit == "client":
        raise Refused(
            "correlated noise takes off what was added to the same numbers before, and "
            f"compression {name!r} sends others; leave it out, or use noise gaussian"
        )
    if compression.broadcast == "sum" and promise.central:
        raise Refused(
            "the server's noise is added after the sum is opened, and the clients would receive it "
            'without; use broadcast "adapter"'
        )
