"""The two roads of a round in which all wait: one program, or sums between the clouds."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError
from fedjax_llm.federation.client_values import ClientInputs, ClientState
from fedjax_llm.federation.exchange import Codec, HiddenSums, Ledger, OnStage
from fedjax_llm.federation.keys import Seeds
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.message import EncodedMessage, WeightCodec
from fedjax_llm.federation.programs import RoundPrograms, remembered
from fedjax_llm.federation.recipe import Applied, Global, Sums
from fedjax_llm.federation.tables import Participant
from fedjax_llm.training import ClientMetrics

PyTree = Any


class ToOpen(NamedTuple):
    """A sum between clouds that is about to be opened.

    Attributes:
        round: from 1.
        sum: among those of the round, from 0.
        clouds: that send.
        digest: sha256 of the integers that are added, hexadecimal.
    """

    round: int
    sum: int
    clouds: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, number: int, place: int, clouds: Sequence[str], ints_CxP: jax.Array) -> "ToOpen":
        """Of the clouds' messages, int32 [C, P]."""
        whole = np.ascontiguousarray(np.asarray(ints_CxP), dtype="<i4")
        return cls(number, place, tuple(clouds), hashlib.sha256(whole.tobytes()).hexdigest())


BeforeOpening = Callable[[ToOpen], None]


class Outcome(NamedTuple):
    """What a round came to.

    Attributes:
        applied: the server after it.
        clients: what the clients carry on.
        metrics: their measurements.
        norm_K: l2 norms of the messages of the first stage, before they are shortened.
        pending: messages that have not landed; () where all wait for each other.
    """

    applied: Applied
    clients: ClientState
    metrics: ClientMetrics
    norm_K: jax.Array | NDArray[np.float32]
    pending: PyTree = ()


@dataclass(frozen=True)
class Road:
    """What both roads need beside a round's own.

    Attributes:
        base: frozen weights on all devices.
        layout: of the clients.
        seed: the run's key.
        participants: the clients.
        stops: whether a client whose training diverged ends the round, by name.
        sums_weights: whether weights are summed before messages are sent.
    """

    base: PyTree
    layout: CohortLayout
    seed: jax.Array | Seeds
    participants: Sequence[Participant]
    stops: bool
    sums_weights: bool

    def plain(
        self,
        programs: RoundPrograms,
        state: Global,
        clients: ClientInputs,
        inverse: jax.Array,
        number: int,
        ledger: Ledger,
        donate: bool,
    ) -> Outcome:
        """All of a round as one program.

        With `donate` it may write over `state` and what `clients` carry.
        """
        started = time.perf_counter()
        program = programs.last_round if donate else programs.round
        applied, local, message, limbs_Kx4 = jax.block_until_ready(
            program(
                self.base,
                self.layout.replicate(state),
                clients.state,
                clients._replace(state=ClientState((), {}, ())),
                inverse,
                self.seed,
                self.layout.replicate(np.int32(number)),
            )
        )
        if self.sums_weights:
            self._check_weights(limbs_Kx4, number)
        self.check(message, number)
        ledger.seconds["train"] = time.perf_counter() - started
        return Outcome(applied, local.state, local.metrics, message.norm)

    def hidden(
        self,
        programs: RoundPrograms,
        state: Global,
        clients: ClientInputs,
        inverse: jax.Array,
        number: int,
        ledger: Ledger,
        sums: HiddenSums,
        senders: Sequence[str],
        online: Sequence[str],
        on_stage: OnStage,
        before_opening: BeforeOpening,
    ) -> Outcome:
        """A round whose sums are taken between the clouds."""
        shared = self.layout.replicate(state)
        where = (self.seed, self.layout.replicate(np.int32(number)))
        a_round = programs.stages + self.sums_weights
        numbers = iter(range((number - 1) * a_round + 1, number * a_round + 1))

        summed = programs.leaves_cloud

        def total(ints_CxP: jax.Array, codec: Codec, by_cloud: bool) -> jax.Array:
            if not by_cloud:
                ints_CxP = programs.by_cloud(ints_CxP)
            place = next(numbers)
            before_opening(
                ToOpen.of(number, (place - 1) % a_round, senders, ints_CxP[: len(ledger.sent)])
            )
            found = sums.total(codec, ints_CxP, senders, online, place, ledger, on_stage)
            return jnp.asarray(found, jnp.int32)

        started = time.perf_counter()
        known = Sums()
        if self.sums_weights:
            local = jax.block_until_ready(programs.train(self.base, shared, clients, *where))
            limbs_Kx4 = programs.weigh(shared, clients, local, *where)
            self._check_weights(limbs_Kx4, number)
            ledger.seconds["train"] = time.perf_counter() - started
            known = Sums(programs.inverse_weight(total(limbs_Kx4, WeightCodec, False)))
            message = programs.send(0, shared, clients, local, known, *where, summed=summed)
            self.check(message, number)
        else:
            local, message = jax.block_until_ready(
                programs.train_and_send(self.base, shared, clients, *where, summed=summed)
            )
            ledger.seconds["train"] = time.perf_counter() - started
            self.check(message, number)
        first = message
        for stage, codec in enumerate(programs.codecs[:-1]):
            opened = total(message.ints_P, codec, summed == "cloud")
            public = programs.between(stage, opened, inverse, shared, *where)
            known = known._replace(public=public)
            message = programs.send(stage + 1, shared, clients, local, known, *where, summed=summed)
        opened = total(message.ints_P, programs.codecs[-1], summed == "cloud")
        started = time.perf_counter()
        applied = jax.block_until_ready(
            programs.apply(opened, inverse, shared, clients, local, known, *where)
        )
        ledger.seconds["apply"] = time.perf_counter() - started
        return Outcome(applied, remembered(local.state, message), local.metrics, first.norm)

    def check(self, message: EncodedMessage, number: int) -> None:
        """Stops a round that diverged, where that follows from noised sums or is not private."""
        if not self.stops:
            return
        norms_K = np.asarray(message.norm)[: len(self.participants)]
        for participant, norm in zip(self.participants, norms_K, strict=True):
            if not math.isfinite(norm):
                what = "client" if participant.client else "cloud"
                raise UserError(
                    f"round {number}: the update of {what} {participant.name!r} is not finite, "
                    "training diverged; lower [training] learning_rate (the last round's state is "
                    "kept)"
                )

    def _check_weights(self, limbs_Kx4: jax.Array, number: int) -> None:
        names = [participant.name for participant in self.participants]
        WeightCodec.check(np.asarray(limbs_Kx4)[: len(names)], names, number)
