"""From settings to what runs: rows and programs on devices, keys between clouds, virtual time.

Unlike `assembly` this puts things on devices and makes keys. Programs are compiled when first used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from fedjax_llm.aggregation import LossWeights, Weights
from fedjax_llm.federation.assembly import Settings, assemble
from fedjax_llm.federation.engine import Engine
from fedjax_llm.federation.evaluation import HeldOut
from fedjax_llm.federation.exchange import hidden_sums
from fedjax_llm.federation.fitting import on_a_cpu
from fedjax_llm.federation.keys import Seeds
from fedjax_llm.federation.layout import CohortLayout, Memory
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.federation.planned_sums import planned_sums
from fedjax_llm.federation.roads import Road
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.rounds import Rounds
from fedjax_llm.federation.sums import SumMode
from fedjax_llm.federation.tables import Participant
from fedjax_llm.federation.virtual import almanac_of
from fedjax_llm.federation.wire_sizes import WireSizes
from fedjax_llm.models import Model, loss


@dataclass(frozen=True)
class Placing:
    """Where a federation computes; `Federation` says what each of it means.

    Attributes:
        clients_at_once: in one vmap; chosen if None.
        devices: all if None.
        mesh: how they are divided; all among the clients if None.
        rows: where training rows lie.
        evaluation_microbatch: evaluation rows in memory at once on a device.
    """

    clients_at_once: int | None
    devices: Sequence[jax.Device] | None
    mesh: MeshShape | None
    rows: Memory | Literal["auto"]
    evaluation_microbatch: int

    def layout(self, clients: int, tokens: int) -> CohortLayout:
        """Of so many clients, each with so many tokens in a micro-batch."""
        group = self.clients_at_once
        if group is None:
            # On an accelerator that is where it starts from, see `Rounds.run`.
            group = on_a_cpu(clients, tokens)
        return CohortLayout.over(clients, group, self.devices, self.mesh)


@dataclass(frozen=True, eq=False)
class Machinery:
    """What a federation runs with.

    Attributes:
        rounds: run the rounds; they have the engine, the sums between the clouds and the almanac.
        held_out: measures the clients' evaluation rows.
        sizes: bytes where they are not counted as they are sent.
    """

    rounds: Rounds
    held_out: HeldOut
    sizes: WireSizes


def machinery(
    model: Model,
    participants: Sequence[Participant],
    settings: Settings,
    placing: Placing,
    *,
    weights: Weights | LossWeights | Sequence[float] | None,
    timed_as: SumMode | None,
    steps: int,
    seed: int,
    roots: jax.Array | Seeds,
) -> Machinery:
    """Sets a federation up.

    Args:
        model: the frozen base.
        participants: the clients.
        settings: what is asked for.
        placing: where it computes.
        weights: of the clients.
        timed_as: the sum whose bytes virtual time counts; that of the settings if None.
        steps: server steps of the run.
        seed: of jitter and failures in virtual time.
        roots: of all other randomness.

    Raises:
        UserError, Refused: as `Federation`.
    """
    training, plan, mode = settings.training, settings.plan, settings.sum_mode
    length = participants[0].train.tokens_BxT.shape[1]
    layout = placing.layout(len(participants), training.microbatch * length)
    where: Memory = "device" if placing.rows == "auto" else placing.rows
    rank = settings.lora.rank
    roster = Roster(participants, layout, training, plan, weights, rank, roots, where)
    parts = assemble(model, settings, roster, layout)
    road = Road(
        layout.place_base(model.config, model.base),
        layout,
        roots,
        participants,
        # Stopping by name would release what unit `client` hides: there the codec sends zeros.
        # With unit `example` an update follows from noised sums alone, and so does this error.
        plan.unit != "client",
        parts.recipe.sums_weights,
    )
    engine = Engine.of(roster, parts.recipe, road, parts.codecs)
    held_out = HeldOut(
        layout,
        [participant.evaluation for participant in participants],
        lambda base, adapter, batch: loss(model.config, base, adapter, batch, dtype=settings.dtype),
        placing.evaluation_microbatch,
    )
    hidden = hidden_sums(mode, parts, roster)
    timed = hidden if timed_as is None else planned_sums(timed_as, parts, roster)
    rounds = Rounds(
        engine,
        settings.rule,
        plan,
        settings.schedule,
        settings.robust,
        hidden,
        almanac_of(model, settings, parts, roster, timed, length, seed),
        steps,
        placing.clients_at_once is not None,
        placing.rows == "auto",
    )
    return Machinery(rounds, held_out, parts.sizes)
