"""How a round runs: who takes part, on which road, and what happens when memory runs out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.clouds.schedules import Schedule
from fedjax_llm.federation import pending, processes
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.engine import Engine
from fedjax_llm.federation.exchange import HiddenSums, Ledger, OnStage
from fedjax_llm.federation.fitting import memory_of
from fedjax_llm.federation.roads import BeforeOpening, Outcome, ToOpen
from fedjax_llm.federation.shares import check_online
from fedjax_llm.federation.state import FederationState
from fedjax_llm.federation.virtual import Almanac
from fedjax_llm.privacy import PrivacyPlan


class Done(NamedTuple):
    """A round that has run.

    Attributes:
        outcome: what it came to.
        ledger: bytes and seconds.
        calendar: virtual time.
        online: clouds that could be reached.
        lands_K: clients whose messages entered the sum.
    """

    outcome: Outcome
    ledger: Ledger
    calendar: Calendar
    online: list[str]
    lands_K: NDArray[np.bool_]


class _Between(NamedTuple):
    """Of sums between the clouds: who sends, who can help to open, and who is told."""

    senders: Sequence[str]
    online: Sequence[str]
    on_stage: OnStage
    before_opening: BeforeOpening


@dataclass(eq=False)
class Rounds:
    """Runs the rounds of a federation.

    Attributes:
        engine: what is compiled; another one once the number of clients at once changes.
        rule: of aggregation.
        plan: how clients are sampled.
        schedule: when the server waits for whom.
        robust: a robust combination, or None.
        hidden: the sums between the clouds; None on the devices.
        almanac: makes the calendar.
        steps: server steps of the run.
        fits: whether the number of clients at once is settled.
        rows_may_move: whether the clients' rows may be left in the host's memory, which is not
            settled yet.
    """

    engine: Engine
    rule: AggregationRule
    plan: PrivacyPlan
    schedule: Schedule
    robust: Any
    hidden: HiddenSums | None
    almanac: Almanac
    steps: int
    fits: bool
    rows_may_move: bool = False

    def keep_at_once(self, clients: int) -> None:
        """Runs so many clients at once from now on, whatever fits."""
        self.fits = True
        if clients != self.engine.layout.group:
            self.engine = self.engine.at_once(clients)

    def run(
        self,
        state: FederationState,
        number: int,
        on_stage: OnStage,
        before_opening: BeforeOpening,
        donate: bool,
    ) -> Done:
        """Runs a round; arguments and errors as `Federation.run_round`."""
        roster = self.engine.roster
        online_K = roster.online(number)
        calendar = self.almanac.calendar(max(number, self.steps))
        lands_K = online_K & calendar.landing(number).lands_K
        self._check(number, lands_K, online_K)
        online = roster.clouds_online(online_K)
        self._fit(state)
        opened: list[int] = []

        def opens(what: ToOpen) -> None:
            opened.append(what.sum)
            before_opening(what)

        between = _Between(roster.clouds_online(lands_K), online, on_stage, opens)
        on_stage("train")
        while True:
            ledger = Ledger.of(roster.names)
            try:
                outcome = self._outcome(state, number, lands_K, calendar, ledger, between, donate)
                return Done(outcome, ledger, calendar, online, lands_K)
            except jax.errors.JaxRuntimeError as error:
                # Of messages that have been added between the clouds there is no second sum.
                if opened:
                    raise
                # The other processes do not know of it, and wait in the program that failed here.
                lost = processes.several() or _is_deleted(state)
                self.engine = self.engine.halved(error, lost)

    def _fit(self, state: FederationState) -> None:
        """Takes as many clients at once as a device's memory holds, unless a number is set.

        Before that it finds out whether their rows fit, unless that is set.
        """
        if self.fits and not self.rows_may_move:
            return
        settled = self.engine.layout.group if self.fits else None
        rows_may_move, self.fits, self.rows_may_move = self.rows_may_move, True, False
        own = memory_of(self.engine.layout.mesh.local_devices[0])
        # All processes have to come to the same number.
        memory = int(processes.from_first(np.int64(own or 0)))
        if memory:
            plain = self.hidden is None and self.schedule.timely
            self.engine = self.engine.fitted(state, memory, plain, settled, rows_may_move)

    def _outcome(
        self,
        state: FederationState,
        number: int,
        lands_K: NDArray[np.bool_],
        calendar: Calendar,
        ledger: Ledger,
        between: _Between,
        donate: bool,
    ) -> Outcome:
        """What a round comes to, on the road that sum and schedule ask for."""
        engine = self.engine
        road, roster = engine.road, engine.roster
        programs = engine.programs[self.rule.phase(number)]
        if not self.schedule.timely:
            opener = self._opener(number, ledger, between)
            return pending.step(road, programs, roster, calendar, state, ledger, opener)
        selected_K = lands_K & roster.selected(number)
        clients = roster.inputs(state.clients, number, selected_K, lands_K)
        divisor = roster.divisor(lands_K, engine.recipe.sums_weights)
        inverse = engine.layout.replicate(np.float32(1 / divisor))
        given = (programs, state.globals, clients, inverse, number, ledger)
        if self.hidden is None:
            return road.plain(*given, donate)
        return road.hidden(*given, self.hidden, *between)

    def _check(self, number: int, lands_K: NDArray[np.bool_], online_K: NDArray[np.bool_]) -> None:
        """Refuses a sum of messages that are too few for what combines, opens or hides them."""
        roster = self.engine.roster
        if isinstance(self.robust, GroupRobust):
            groups = self.engine.recipe.groups or ()
            reached = {group for group, here in zip(groups, lands_K, strict=True) if here}
            self.robust.inner.check(len(reached))
        elif self.robust is not None:
            self.robust.check(int(lands_K.sum()))
        if self.hidden is not None:
            self.hidden.check(roster.clouds_online(lands_K), roster.clouds_online(online_K))
        if self.plan.integer is not None:
            check_online(self.plan.integer, int(lands_K.sum()), number)

    def _opener(self, number: int, ledger: Ledger, between: _Between) -> pending.Open | None:
        """What takes the sum of one stage between the clouds; None on the devices."""
        hidden, programs = self.hidden, self.engine.programs[self.rule.phase(number)]
        if hidden is None:
            return None

        def opened(ints_KxP: jax.Array) -> jax.Array:
            ints_CxP = programs.by_cloud(ints_KxP)
            own_CxP = ints_CxP[: len(ledger.sent)]
            between.before_opening(ToOpen.of(number, 0, between.senders, own_CxP))
            found = hidden.total(
                programs.codecs[0],
                ints_CxP,
                between.senders,
                between.online,
                number,
                ledger,
                between.on_stage,
            )
            return jnp.asarray(found, jnp.int32)

        return opened


def _is_deleted(state: FederationState) -> bool:
    leaves = jax.tree.leaves(state)
    return any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))
