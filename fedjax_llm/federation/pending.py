"""The road of a step whose messages were written by clients that do not wait for each other.

A message is computed when its client begins, from the version that it begins with, and kept until
the step that takes it. Nothing of it depends on what happens meanwhile, so that this gives the same
as computing it in the virtual moment in which the client would be through.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.federation.exchange import Ledger
from fedjax_llm.federation.programs import RoundPrograms, remembered
from fedjax_llm.federation.recipe import Sums
from fedjax_llm.federation.roads import Outcome, Road
from fedjax_llm.federation.roster import Roster
from fedjax_llm.federation.state import FederationState
from fedjax_llm.training import ClientMetrics

# From the clouds' messages, int32 [K, P], to their sum, int32 [P].
Open = Callable[[jax.Array], jax.Array]


def step(
    road: Road,
    programs: RoundPrograms,
    roster: Roster,
    calendar: Calendar,
    state: FederationState,
    ledger: Ledger,
    open_sum: Open | None,
) -> Outcome:
    """Trains all that begins with the version at hand, then makes the next one of what lands.

    Args:
        road: what all steps share.
        programs: of the rule's only phase.
        roster: the clients.
        calendar: who begins and what lands.
        state: after the step before.
        ledger: takes the seconds of training and of the server's step.
        open_sum: takes the sum between the clouds; on the devices if None.

    Raises:
        UserError: training diverged in a client, see `Road.check`.
    """
    number = int(state.round) + 1
    shared = road.layout.replicate(state.globals)
    where = (road.seed, road.layout.replicate(np.int32(number)))
    clients, pending = state.clients, road.layout.replicate(state.pending)
    metrics_K = ClientMetrics(*(jnp.zeros(road.layout.padded, jnp.float32) for _ in range(3)))
    norm_K = np.zeros(road.layout.padded, np.float32)
    started = time.perf_counter()
    for wave in calendar.waves(number):
        inputs = roster.wave_inputs(clients, wave)
        local, message = jax.block_until_ready(
            programs.train_and_send(road.base, shared, inputs, *where)
        )
        road.check(message, number)
        pending = programs.kept(pending, message.ints_P, wave.slot_K, wave.sends_K)
        carried = remembered(local.state, message)
        clients = road.layout.collect(carried)
        metrics_K = jax.tree.map(jnp.add, metrics_K, local.metrics)
        norm_K = np.maximum(norm_K, np.asarray(message.norm))
    ledger.seconds["train"] = time.perf_counter() - started
    landing = calendar.landing(number)
    ints_KxP = programs.landed(pending, landing.slot_K, landing.lands_K)
    total_P = programs.total(ints_KxP) if open_sum is None else open_sum(ints_KxP)
    started = time.perf_counter()
    senders = roster.inputs(clients, number, landing.lands_K)
    inverse = road.layout.replicate(np.float32(1 / roster.landing_divisor(landing)))
    applied = jax.block_until_ready(
        programs.apply(total_P, inverse, shared, senders, (), Sums(), *where)
    )
    ledger.seconds["apply"] = time.perf_counter() - started
    return Outcome(applied, clients, metrics_K, norm_K, pending)
