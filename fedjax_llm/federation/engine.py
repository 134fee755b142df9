"""What a federation runs on: layout, tables, programs; all of it depends on the clients at once."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.federation.client_values import ClientState
from fedjax_llm.federation.fitting import evened, most_that_fit, program_bytes, usable
from fedjax_llm.federation.layout import CohortLayout, Memory
from fedjax_llm.federation.message import MessageCodec
from fedjax_llm.federation.programs import RoundPrograms
from fedjax_llm.federation.recipe import Recipe
from fedjax_llm.federation.roads import Road
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.state import FederationState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Engine:
    """The parts of a federation that are compiled.

    Attributes:
        roster: the clients, whose tables are laid out.
        recipe: of the programs.
        road: of rounds in which all wait.
        codecs: fixed point of the messages, by phase and stage.
        programs: by phase.
    """

    roster: Roster
    recipe: Recipe
    road: Road
    codecs: tuple[tuple[MessageCodec, ...], ...]
    programs: tuple[RoundPrograms, ...]

    @classmethod
    def of(
        cls,
        roster: Roster,
        recipe: Recipe,
        road: Road,
        codecs: Sequence[tuple[MessageCodec, ...]],
    ) -> "Engine":
        """Nothing is compiled before it is called for."""
        programs = (RoundPrograms(recipe, phase, own) for phase, own in enumerate(codecs))
        return cls(roster, recipe, road, tuple(codecs), tuple(programs))

    @property
    def layout(self) -> CohortLayout:
        """Where clients run."""
        return self.recipe.layout

    def at_once(self, group: int, rows: Memory | None = None) -> "Engine":
        """The same with another number of clients at once, or with rows elsewhere."""
        layout = replace(self.layout, group=group)
        return Engine.of(
            self.roster.laid_out(layout, rows),
            replace(self.recipe, layout=layout),
            replace(self.road, layout=layout),
            self.codecs,
        )

    def fitted(
        self,
        state: FederationState,
        memory: int,
        plain: bool,
        group: int | None = None,
        rows_may_move: bool = False,
    ) -> "Engine":
        """With as many clients at once as the memory of a device holds, see `fitting`.

        Args:
            state: of the first round.
            memory: bytes of a device.
            plain: whether a round is one program.
            group: clients at once, where that is settled.
            rows_may_move: whether the clients' rows are left in the host's memory where they do not
                fit beside a program of `group` clients at once; of one if that is not settled.

        Raises:
            UserError: one client does not fit.
        """
        bytes_of = functools.cache(lambda group: self.at_once(group).bytes(state, plain))
        if rows_may_move and bytes_of(group or 1) > usable(memory):
            _log.info("the clients' rows stay in the host's memory; a group's are copied at a time")
            moved = self.at_once(self.layout.group, "host")
            return moved.fitted(state, memory, plain, group)
        if group is not None:
            return self
        each = -(-self.layout.clients // self.layout.places)
        group = evened(each, most_that_fit(bytes_of, each, memory))
        _log.info("%d of %d clients of a device run at once", group, each)
        return self.at_once(group)

    def bytes(self, state: FederationState, plain: bool) -> int:
        """Bytes of a device that the program which trains takes; it is compiled and not run."""
        programs, road = self.programs[0], self.road
        everyone_K = np.ones(self.layout.clients, bool)
        # Rows that would not fit cannot be put there to find that out.
        clients = self.roster.in_shapes().inputs(state.clients, 1, everyone_K)
        shared = self.layout.replicate(state.globals)
        where = (road.seed, jnp.int32(1))
        if plain:
            rest = clients._replace(state=ClientState((), {}, ()))
            given = (road.base, shared, clients.state, rest, jnp.float32(1), *where)
            return program_bytes(programs.round.lower(*given).compile())
        lowered = programs.train_and_send.lower(
            road.base, shared, clients, *where, summed=programs.leaves_cloud
        )
        return program_bytes(lowered.compile())

    def halved(self, error: jax.errors.JaxRuntimeError, lost: bool) -> "Engine":
        """After memory ran out while clients trained: half of them at once.

        Args:
            error: what the device said; raised again if it is about something else.
            lost: whether the state was given away to the program that failed.

        Raises:
            UserError: one client alone does not fit, or the state is lost.
        """
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        group = self.layout.group
        if group == 1:
            raise UserError(
                "out of memory with one client at once; lower microbatch, set remat = true, or "
                "spread the model over more devices"
            ) from error
        if lost:
            raise UserError(
                f"out of memory with {group} clients at once; go on from the last checkpoint with "
                f"clients_at_once = {group // 2}"
            ) from error
        _log.warning("out of memory with %d clients at once: %d from now on", group, group // 2)
        return self.at_once(group // 2)
