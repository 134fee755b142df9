"""Virtual time: the clouds of a run as the simulation sees them, and what they cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from fedjax_llm.clouds.compute import Compute, training_flops
from fedjax_llm.clouds.schedules import Schedule
from fedjax_llm.clouds.site import Opening, Site, Size
from fedjax_llm.errors import UserError
from fedjax_llm.federation.assembly import Assembly, Settings
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.exchange import HiddenSums
from fedjax_llm.federation.message import MessageCodec
from fedjax_llm.federation.planned_sums import PlannedSums
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.wire_sizes import WireSizes
from fedjax_llm.lora import Adapter
from fedjax_llm.models import Model, base_shapes

# A cloud that does not say what it computes with: one NVIDIA A100, whose datasheet gives
# 312 TFLOP/s in bfloat16 without sparsity. Virtual time must not depend on this machine.
NOMINAL = Compute(peak_flops=312e12)


def flops_per_token(model: Model, adapter: Adapter, length: int, remat: bool) -> float:
    """Floating-point operations of training on one position; see `clouds.training_flops`.

    Args:
        model: the frozen base.
        adapter: what is trained; shapes are enough.
        length: positions of a row.
        remat: whether activations are computed twice.
    """
    config = model.config
    # Quantised weights are computed with as if they were floats.
    leaves = jax.tree.leaves(base_shapes(config))
    matrices = sum(math.prod(leaf.shape) for leaf in leaves)
    if not config.tie_embeddings:
        # The input embedding is looked up; tied, it is the output's matrix as well.
        matrices -= config.vocab_size * config.hidden_size
    return training_flops(
        matrices,
        adapter=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter)),
        layers=config.num_layers,
        width=config.num_heads * config.head_dim,
        length=length,
        remat=remat,
    )


class Almanac:
    """Makes the calendar of a federation; `almanac_of` gathers what it needs.

    Args:
        schedule: when the server waits for whom.
        roster: the clients.
        sizes: bytes where they are not counted as they are sent.
        codecs: of the messages of each phase.
        hidden: the sums between the clouds, opened or only planned; None on the devices.
        fragments: in how many parts the layers travel in turn.
        flops: of training on one position.
        length: positions of a row.
        seed: of jitter and failures.
    """

    def __init__(
        self,
        schedule: Schedule,
        roster: Roster,
        sizes: WireSizes,
        codecs: Sequence[Sequence[MessageCodec]],
        hidden: HiddenSums | PlannedSums | None,
        fragments: int,
        flops: float,
        length: int,
        seed: int,
    ) -> None:
        self._schedule, self._roster = schedule, roster
        self._sizes, self._codecs, self._hidden = sizes, codecs, hidden
        self._fragments, self._flops, self._length, self._seed = fragments, flops, length, seed
        self._made: Calendar | None = None

    def calendar(self, steps: int) -> Calendar:
        """The calendar of at least so many server steps.

        Raises:
            UserError: it was made for fewer, and clouds do not wait for each other: what is under
                way at its end depends on where that is.
        """
        made = self._made
        if made is None or len(made.timeline.steps) < steps:
            if made is not None and not self._schedule.timely:
                raise UserError(
                    f"round {steps}: the run was planned for {len(made.timeline.steps)} rounds, "
                    f"and with schedule {self._schedule.name!r} what is under way at its end "
                    "depends on that; plan more rounds from the start"
                )
            timeline = self._schedule.simulate(
                self._sites(),
                steps if made is None else 2 * steps,
                Opening() if self._hidden is None else self._hidden.opening(),
                self._present if self._schedule.timely else None,
            )
            seeded = [cloud.seeded(self._seed) for cloud in self._roster.clouds]
            self._made = made = Calendar(
                self._schedule, timeline, self._roster.cloud_K, seeded, self._fragments
            )
        return made

    def _present(self, number: int) -> list[bool]:
        """The clouds that can be reached in a round.

        Those that were not sampled seem to take part: neither who lands nor what a sum is divided
        by may follow from a sample that the guarantee of unit `client` keeps secret.
        """
        names = self._roster.clouds_online(self._roster.reachable(number))
        return [name in names for name in self._roster.names]

    def _sites(self) -> list[Site]:
        """The clouds as the simulation sees them; made anew for each, as they count transfers."""
        online_K = np.ones(len(self._roster.participants), bool)
        phases = range(len(self._codecs))
        plain_PxC = [self._sizes.up(phase, online_K) for phase in phases]
        down_PxC = [self._sizes.down(phase, online_K) for phase in phases]
        whole_C = self._sizes.whole()
        sites = []
        for place, cloud in enumerate(self._roster.clouds):
            own = cloud.seeded(self._seed)
            compute = (own.compute or NOMINAL).for_model(self._flops)
            members = self._roster.members(place)
            steps = [int(self._roster.steps_K[k]) for k in members]
            rows = sum(int(self._roster.steps_K[k] * self._roster.batch_K[k]) for k in members)
            tokens = rows * self._length
            sizes = []
            for phase, codecs in enumerate(self._codecs):
                up = plain_PxC[phase][place]
                if self._hidden is not None:
                    up = sum(self._hidden.upload_bytes(codec, own.name) for codec in codecs)
                sizes.append(Size(down_PxC[phase][place], up))
            sites.append(
                Site(
                    own.name,
                    place,
                    own.link.down.finish,
                    own.link.up.finish,
                    compute.seconds(tokens) / max(steps),
                    max(steps),
                    sizes,
                    whole_C[place],
                    own.presence,
                )
            )
        return sites


def almanac_of(
    model: Model,
    settings: Settings,
    parts: Assembly,
    roster: Roster,
    hidden: HiddenSums | PlannedSums | None,
    length: int,
    seed: int,
) -> Almanac:
    """The almanac of a federation.

    Args:
        model: the frozen base; shapes are enough.
        settings: what is asked for.
        parts: from `assemble`, of these settings, or of some that send the same.
        roster: the clients.
        hidden: the sums between the clouds, opened or only planned; None on the devices.
        length: positions of a row.
        seed: of jitter and failures.
    """
    replicas = parts.recipe.replicas
    return Almanac(
        settings.schedule,
        roster,
        parts.sizes,
        parts.codecs,
        hidden,
        replicas.fragments if replicas else 1,
        flops_per_token(model, parts.server.adapter, length, settings.remat),
        length,
        seed,
    )


@dataclass(frozen=True)
class Spent:
    """What a cloud spends in one server step, in virtual time and dollars.

    Attributes:
        link: seconds of transfer of the message that landed, both ways.
        train: seconds of training behind it.
        dollars: of the step, see `clouds.money`.
    """

    link: float
    train: float
    dollars: float


def spent_in(calendar: Calendar, step: int) -> list[Spent]:
    """What each cloud spends in a server step, from 1."""
    timeline = calendar.timeline
    landing = timeline.landing(step)
    found = []
    for place, dollars in enumerate(calendar.bill.clouds_NxC[step - 1].tolist()):
        link = train = 0.0
        if place in landing:
            cycle = timeline.cycle(landing[place])
            link = cycle.received - cycle.start + cycle.arrived - cycle.trained
            train = cycle.trained - cycle.received
        found.append(Spent(link, train, dollars))
    return found
