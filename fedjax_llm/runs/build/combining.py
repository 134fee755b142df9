"""How messages become one: rule, combination, weights, and who sends something else."""

from collections.abc import Sequence

from fedjax_llm.aggregation import (
    RULES,
    SERVER_OPTIMIZERS,
    AggregationRule,
    LossWeights,
    NormalisedMean,
    Weights,
    step_norm,
)
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import COMBINES, Combine, GroupRobust
from fedjax_llm.data import Corpus
from fedjax_llm.federation import Attackers, Combination
from fedjax_llm.runs.build.rows import LABEL_FLIP
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.training import MOMENTUM


def rule(run_file: RunFile) -> AggregationRule:
    """The aggregation rule with its server optimiser."""
    section = run_file.aggregation
    optimizer = SERVER_OPTIMIZERS[section.server_optimizer](section.server_learning_rate)
    return RULES[section.rule](optimizer)


def combination(run_file: RunFile) -> Combination | None:
    """How messages, or the sums of groups, are combined; None is the mean."""
    section = run_file.aggregation
    if section.combine == "mean":
        return None
    if section.combine == "normalised":
        return NormalisedMean()
    robust = COMBINES[section.combine](section.byzantine, section.radius)
    return robust if section.groups is None else GroupRobust(section.groups, robust)


def robust(run_file: RunFile) -> Combine | GroupRobust | None:
    """The robust combination, which may carry a memory; None for the means."""
    found = combination(run_file)
    return None if isinstance(found, NormalisedMean) else found


def weights(run_file: RunFile, data: Sequence[Corpus]) -> Weights | LossWeights:
    """What each client counts in the mean."""
    section, training = run_file.aggregation, run_file.training
    if section.weights in ("loss", "loss-bounded"):
        own = section.loss_weights
        bound = own.bound if section.weights == "loss-bounded" else None
        return LossWeights(own.alpha, bound, own.loss, own.rows, own.up_mbps)
    clients = [
        (cloud, corpus, k)
        for cloud, corpus in zip(run_file.clouds, data, strict=True)
        for k in range(cloud.clients)
    ]
    values: list[float] | None = None
    if section.weights == "public":
        values = [cloud.weight for cloud, _, _ in clients]
    elif section.weights == "examples":
        values = [corpus.client_rows[k] for _, corpus, k in clients]
    elif section.weights == "tokens":
        values = [_answer_tokens(corpus, k) for _, corpus, k in clients]
    norms = None
    if section.normalise_steps:
        momentum = MOMENTUM.get(training.optimizer, 0.0)
        norms = [
            step_norm(cloud.local_steps or training.local_steps, momentum)
            for cloud, _, _ in clients
        ]
    kind = section.weights if section.weights in ("examples", "tokens") else "uniform"
    return Weights.of(values, len(clients), norms=norms, kind=kind)


def _answer_tokens(corpus: Corpus, client: int) -> int:
    first = sum(corpus.client_rows[:client])
    rows = corpus.train.loss_mask_BxT[first : first + corpus.client_rows[client]]
    return int(rows.sum())


def attackers(run_file: RunFile) -> Attackers | None:
    """The clients that send something else than what they trained; a label flip is in the data."""
    attack = run_file.attack
    if attack is None or attack.name == LABEL_FLIP:
        return None
    malicious = tuple(
        cloud.name in attack.clouds for cloud in run_file.clouds for _ in range(cloud.clients)
    )
    return Attackers(ATTACKS[attack.name], malicious, attack.scale)
