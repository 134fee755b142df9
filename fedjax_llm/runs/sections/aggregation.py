"""[aggregation] and [attack]: how updates become one, and who sends something else."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Optimizer, Positive, Section, Text, Texts

WeightKind = Literal["uniform", "public", "examples", "tokens", "loss", "loss-bounded"]
CombineName = Literal[
    "mean",
    "normalised",
    "krum",
    "multi-krum",
    "median",
    "trimmed-mean",
    "geometric-median",
    "centred-clipping",
]
ADDITIVE_COMBINES = ("mean", "normalised")


class LossWeightsSection(Section):
    """[aggregation.loss_weights]: the dynamic rule L / (D B^alpha) of the cross-cloud papers.

    With weights = "loss-bounded" a weight stays within 1/bound and bound of that of an ordinary
    cloud, which `loss` (nats), `rows` and `up_mbps` describe; public guesses, not measurements.
    """

    alpha: Annotated[float, Field(ge=0, le=4)] = 0.5
    bound: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    loss: Positive = 3.0
    rows: Positive = 1000.0
    up_mbps: Positive = 100.0


class AggregationSection(Section):
    """[aggregation]: how the updates of the clouds become one, and the server's optimiser.

    | key | what |
    |---|---|
    | rule | what is trained and sent, and how it is put together; `fedjax-llm rules` lists them |
    | combine | mean; normalised (directions only); or a robust combination, which reads messages |
    | groups | with a robust combination: of the sums of so many groups, not of single messages |
    | byzantine | malicious clients (or groups) that a robust combination is to withstand |
    | radius | of centred-clipping, an l2 norm |
    | exchange | parameters after local_steps, or the gradients of each single step |
    | weights | of each client in the mean; public takes `weight` of [[clouds]] |
    | normalise_steps | FedNova: clouds of more local steps do not count more for it |
    """

    rule: Text = "ffa"
    combine: CombineName = "mean"
    groups: Annotated[int, Field(ge=2)] | None = None
    byzantine: Annotated[int, Field(ge=0)] = 1
    radius: Positive = 1.0
    exchange: Literal["parameters", "gradients"] = "parameters"
    weights: WeightKind = "uniform"
    loss_weights: LossWeightsSection = LossWeightsSection()
    normalise_steps: bool = False
    server_optimizer: Literal[
        Optimizer, "fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"
    ] = "sgd"
    server_learning_rate: Positive = 1.0


class AttackSection(Section):
    """[attack]: some clouds send something else than what they trained, to try a defence.

    `scale` multiplies what they send, see `aggregation.attacks`; label-flip trains on wrong answers
    and takes none.
    """

    name: Literal["sign-flip", "scaled", "gaussian", "little-is-enough", "label-flip"]
    clouds: Texts
    scale: Positive = 1.0


# Combinations that take the number of malicious clients.
_COUNT_MALICIOUS = ("krum", "multi-krum", "trimmed-mean")


def check_aggregation(aggregation: AggregationSection, local_steps: int, secure_sum: str) -> None:
    """Refuses settings that contradict each other, or that nothing would read.

    Args:
      aggregation: the section.
      local_steps: [training] local_steps.
      secure_sum: [secure] sum.
    """
    combine = aggregation.combine
    if aggregation.groups is not None and combine in ADDITIVE_COMBINES:
        raise problem(
            ("aggregation", "groups"),
            f'goes with a robust combine, not with "{combine}"; name one, or remove it',
        )
    if secure_sum != "plain" and combine not in ADDITIVE_COMBINES and aggregation.groups is None:
        raise problem(
            ("aggregation", "combine"),
            f'has to read the message of each cloud, which [secure] sum = "{secure_sum}" hides; '
            'set groups, use combine = "normalised", or sum = "plain"',
            refused=True,
        )
    if aggregation.exchange == "gradients" and local_steps != 1:
        raise problem(
            ("aggregation", "exchange"),
            "sends the gradient of each step, and [training] local_steps is "
            f"{local_steps}; set local_steps = 1",
            got=False,
        )
    weights = aggregation.weights
    unread = {
        "byzantine": (
            combine not in _COUNT_MALICIOUS,
            f"goes with combine = {' or '.join(_COUNT_MALICIOUS)}",
        ),
        "radius": (combine != "centred-clipping", "goes with combine = centred-clipping"),
        "loss_weights": (
            not weights.startswith("loss"),
            "goes with weights = loss or loss-bounded",
        ),
    }
    for key, (idle, what) in unread.items():
        if idle and getattr(aggregation, key) != AggregationSection.model_fields[key].default:
            raise problem(("aggregation", key), f"{what}; remove it", got=False)
    bound = LossWeightsSection.model_fields["bound"].default
    if weights == "loss" and aggregation.loss_weights.bound != bound:
        raise problem(
            ("aggregation", "loss_weights", "bound"),
            "goes with weights = loss-bounded, the published rule has none; remove it",
            got=False,
        )


def check_attack(
    attack: AttackSection | None, clouds: Sequence[str], unit: str, divided: bool
) -> None:
    """Refuses an attack by clouds that do not exist, or that no epsilon covers.

    Args:
      attack: the section.
      clouds: names.
      unit: [privacy] unit.
      divided: whether a cloud has several clients.
    """
    if attack is None:
        return
    for index, name in enumerate(attack.clouds):
        if name not in clouds:
            raise problem(("attack", "clouds", index), f"must be one of {', '.join(clouds)}")
    if attack.name != "label-flip":
        return
    if attack.scale != AttackSection.model_fields["scale"].default:
        raise problem(("attack", "scale"), "does not go with label-flip; remove it", got=False)
    if unit in ("example", "user") or (unit == "client" and divided):
        raise problem(
            ("attack", "name"),
            f'gives examples the answers of others in their cloud, and [privacy] unit = "{unit}" '
            "covers a change of one; use unit none, or client with one client a cloud",
            refused=True,
        )
