"""All that the programs of a federation are built from, and what goes in and out of them.

Notation: K' clients with padding, P numbers of a message, G sums that stay apart (groups).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from fedjax_llm.aggregation import AggregationRule, LossWeights, NormalisedMean, ServerState
from fedjax_llm.aggregation.attacks import Attack
from fedjax_llm.aggregation.robust import Combine, GroupRobust
from fedjax_llm.federation.cohort import RowsLossOfBase
from fedjax_llm.federation.compressor import Compressor
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.replicas import Replicas
from fedjax_llm.privacy import AdaptiveClip, Correlation
from fedjax_llm.training import LocalTraining

PyTree = Any


class Global(NamedTuple):
    """What the server holds.

    Attributes:
        server: adapter, optimiser and memory of the rule.
        control: the global control variate of each phase; () without SCAFFOLD.
        combine: memory of a robust combination; () for most.
        noise: what correlated noise keeps; () without.
        clip: the adaptive clip norm of messages; () without.
        compression: the codec's public state; () without.
    """

    server: ServerState
    control: tuple[PyTree, ...]
    combine: PyTree
    noise: PyTree = ()
    clip: PyTree = ()
    compression: PyTree = ()


class Applied(NamedTuple):
    """The server's state after a round, and what the round came to.

    Attributes:
        state: after the round.
        update_norm: l2 norm of the update, before the server's optimiser.
        error: see `aggregation.error`; NaN where it is not measured.
    """

    state: Global
    update_norm: jax.Array
    error: jax.Array


class Sums(NamedTuple):
    """What has been summed before the last stage.

    Attributes:
        inverse_weight: one over the sum of the weights that follow from results; None without.
        public: what the rule made of its stage before; () in the first.
    """

    inverse_weight: jax.Array | None = None
    public: PyTree = ()


@dataclass(frozen=True)
class Attackers:
    """Clients that send something else than what they trained, in a simulation.

    Attributes:
        attack: what they send.
        malicious: one bool for each client.
        scale: of the attack.
    """

    attack: Attack
    malicious: tuple[bool, ...]
    scale: float


@dataclass(frozen=True)
class Recipe:
    """All that the programs of a federation are built from.

    Attributes:
        layout: where clients run.
        training: the local update.
        rule: trainable part, messages and server step.
        rows_loss: `(base, adapter, rows) -> loss in nats of each row`.
        by_loss: weights that follow from losses, or None.
        normalised: messages are divided by their length, or None.
        combine: how messages, or group sums, are combined; None is the mean.
        groups: of each client if group sums stay apart, else None.
        clouds: the cloud of each client; clients of one are summed before anything leaves it.
        attackers: of a simulation with malicious clients, or None.
        server_noise_stddev: standard deviation of the Gaussian noise that the server adds to each
            coordinate of the *sum*; 0 where the clients' messages are private already. With an
            adaptive clip norm in units of that norm.
        server_noise: how the server's noise of different rounds hangs together; None is independent
            noise.
        adaptive: the clip norm of messages follows a private quantile; None keeps it.
        expected: clients expected to take part in a round, a public number.
        sums_weights: whether weights are summed before messages are sent.
        ranks_differ: whether some clients train fewer ranks than the adapter has.
        steps_differ: whether some take fewer local steps than others.
        batches_differ: whether some take smaller batches than others.
        measures_error: whether the aggregation error is measured.
        sampled: whether few of the clients may take part in a round.
        replicas: how clients go on from their own copy; None where each cycle begins with the
            global model.
        compressor: how messages are shortened; None where they are sent whole.
    """

    layout: CohortLayout
    training: LocalTraining
    rule: AggregationRule
    rows_loss: RowsLossOfBase
    by_loss: LossWeights | None
    normalised: NormalisedMean | None
    combine: Combine | GroupRobust | None
    groups: tuple[int, ...] | None
    clouds: tuple[int, ...]
    attackers: Attackers | None
    server_noise_stddev: float
    server_noise: Correlation | None
    adaptive: AdaptiveClip | None
    expected: float
    sums_weights: bool
    measures_error: bool
    ranks_differ: bool
    steps_differ: bool
    batches_differ: bool
    sampled: bool
    replicas: Replicas | None = None
    compressor: Compressor | None = None

    @property
    def reads_messages(self) -> bool:
        """Whether the server reads messages one by one."""
        return self.rule.needs_individual_messages or isinstance(self.combine, Combine)
