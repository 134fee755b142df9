"""The clients of a federation: where each is, what it counts, and who takes part in a round."""

import copy
from collections.abc import Sequence
from functools import cached_property

import jax
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.aggregation import LossWeights, Weights
from fedjax_llm.errors import UserError
from fedjax_llm.federation.calendar import Landing, Wave
from fedjax_llm.federation.client_values import ClientInputs, ClientState
from fedjax_llm.federation.host_rows import packed
from fedjax_llm.federation.keys import Purpose, Seeds, key_for
from fedjax_llm.federation.layout import CohortLayout, Memory
from fedjax_llm.federation.tables import (
    Participant,
    batch_of,
    client_tables,
    clouds_of,
    table_shapes,
)
from fedjax_llm.privacy import PrivacyPlan, poisson_sample
from fedjax_llm.privacy.weights import Weights as WeightKind
from fedjax_llm.training import ClientTable, LocalTraining


class Roster:
    """Who the clients are, which does not change, and who takes part, which does.

    Args:
        participants: the clients, in order.
        layout: where they are computed.
        training: what they do.
        plan: how they are sampled.
        weights: what each counts; by loss, beforehand, or uniform if None.
        rank: of the adapter.
        seed: the run's key.
        rows: where the clients' rows lie.

    Raises:
        UserError: weights that do not fit.
    """

    def __init__(
        self,
        participants: Sequence[Participant],
        layout: CohortLayout,
        training: LocalTraining,
        plan: PrivacyPlan,
        weights: Weights | LossWeights | Sequence[float] | None,
        rank: int,
        seed: jax.Array | Seeds,
        rows: Memory = "device",
    ) -> None:
        self.rows: Memory = rows
        self.participants = tuple(participants)
        self.clouds, self.cloud_K = clouds_of(participants)
        self._layout, self._plan, self._seed = layout, plan, seed
        count = len(self.participants)
        self.by_loss = weights if isinstance(weights, LossWeights) else None
        self.weights = (
            weights
            if isinstance(weights, Weights)
            else Weights.of(None if isinstance(weights, LossWeights) else weights, count)
        )
        self.ranks = tuple(rank if p.rank is None else p.rank for p in participants)
        steps = [training.steps if p.local_steps is None else p.local_steps for p in participants]
        self.steps_K = np.array(steps, np.int32)
        self.batch_K = np.array([batch_of(p, training) for p in participants], np.int32)
        self._beforehand_K = self.weights.contributions_K
        if self.by_loss is not None:
            self._beforehand_K = self.by_loss.beforehand(
                [p.rows for p in participants], [p.cloud.link.up_mbps for p in participants]
            )
        self._training = training

    def laid_out(self, layout: CohortLayout, rows: Memory | None = None) -> "Roster":
        """The same clients, computed elsewhere or in other groups; rows stay where they are."""
        other = copy.copy(self)
        other.__dict__.pop("_tables", None)
        other._layout, other.rows = layout, rows or self.rows
        return other

    def in_shapes(self) -> "Roster":
        """The same clients, of whose rows there are shapes alone: to compile for, not to run."""
        other = copy.copy(self)
        other.__dict__["_tables"] = self._placed(table_shapes(self.participants, self._training))
        return other

    @cached_property
    def _tables(self) -> ClientTable:
        """The rows where they lie; who only asks who takes part when never makes them."""
        return self._placed(client_tables(self.participants, self._training))

    def _placed(self, table: ClientTable) -> ClientTable:
        # Rows are what is large; numbers of clients are read by the program as a whole.
        placed: ClientTable = self._layout.shard(table._replace(rows=()))
        rows = packed(table.rows) if self.rows == "host" else table.rows
        return placed._replace(rows=self._layout.shard(rows, self.rows))

    @property
    def names(self) -> tuple[str, ...]:
        """The clouds' names, in order."""
        return tuple(cloud.name for cloud in self.clouds)

    @property
    def kind(self) -> WeightKind:
        """What the weights follow from, as the privacy plan calls it."""
        if self.by_loss is not None:
            return "loss" if self.by_loss.bound is None else "loss-bounded"
        return self.weights.kind

    @property
    def weighs(self) -> bool:
        """Whether clients count unequally."""
        return self.by_loss is not None or bool(np.any(self.weights.contributions_K != 1))

    def members(self, cloud: int) -> list[int]:
        """The places of a cloud's clients."""
        return self._members[cloud]

    @cached_property
    def _members(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.clouds]
        for k, cloud in enumerate(self.cloud_K):
            found[cloud].append(k)
        return found

    def place_of(self, cloud: str) -> int:
        """The place of a cloud's first client.

        Raises:
            UserError: no such cloud.
        """
        if cloud not in self.names:
            raise UserError(f"no cloud {cloud!r}; there are {', '.join(self.names)}")
        return self.cloud_K.index(self.names.index(cloud))

    def online(self, number: int) -> NDArray[np.bool_]:
        """Which clients can be reached in a round.

        Raises:
            UserError: none.
        """
        online_K = self.reachable(number)
        if not online_K.any():
            raise UserError(f"round {number}: no cloud is online; resume when one is")
        return online_K

    def reachable(self, number: int) -> NDArray[np.bool_]:
        """As `online`, also where that is nobody."""
        return np.array([number not in p.offline_rounds for p in self.participants], bool)

    def clouds_online(self, online_K: NDArray[np.bool_]) -> list[str]:
        """The clouds with a client that can be reached, in order."""
        here = {cloud for cloud, online in zip(self.cloud_K, online_K, strict=True) if online}
        return [name for cloud, name in enumerate(self.names) if cloud in here]

    def selected(self, number: int) -> NDArray[np.bool_]:
        """Which clients take part: all, or those due and sampled when the unit is the client."""
        count, sampler = len(self.participants), self._plan.sampler
        if self._plan.unit != "client":
            return np.ones(count, dtype=bool)
        due_K = np.arange(count) % sampler.period == (number - 1) % sampler.period
        if sampler.kind == "full":
            return due_K
        key = key_for(self._seed, Purpose.CLIENT_SAMPLING, number)
        indices_K, chosen = poisson_sample(key, count, sampler.rates[0], count, due_K)
        selected_K = np.zeros(count, dtype=bool)
        selected_K[np.asarray(indices_K)[: int(chosen)]] = True
        return selected_K

    def divisor(self, online_K: NDArray[np.bool_], summed_first: bool) -> float:
        """The public number that turns the sum into a mean.

        Args:
            online_K: who could be reached.
            summed_first: whether messages carry shares of a sum of weights that add up to one.
        """
        if summed_first:
            return 1.0
        divisor = self.weights.divisor(online_K)
        if self.by_loss is not None:
            divisor = float(online_K.sum()) * self.by_loss.ordinary
        if self._plan.unit == "client":
            # The expected number, not the realised one, which the guarantee does not cover.
            divisor *= self._plan.sampler.rates[0] / self._plan.sampler.period
        return divisor

    def landing_divisor(self, landing: Landing) -> float:
        """The public number that turns the sum of what lands into a mean; age counts only above."""
        return float((self._beforehand_K * landing.factor_K)[landing.lands_K].sum())

    def inputs(
        self,
        own: ClientState,
        number: int,
        participates_K: NDArray[np.bool_],
        online_K: NDArray[np.bool_] | None = None,
    ) -> ClientInputs:
        """What the programs need of each client in a round in which all start together.

        Args:
            own: what the clients carry, leaves [K, ...].
            number: of the round.
            participates_K: whose messages enter the sum.
            online_K: who can be reached; those who take part if None.
        """
        count = len(self.participants)
        wave = Wave(
            trains_K=participates_K,
            sends_K=participates_K,
            fresh_K=np.zeros(count, bool),
            merged_KxP=np.zeros((count, 1), bool),
            turn_K=np.full(count, number, np.int32),
            lands_K=np.full(count, number, np.int32),
            slot_K=np.zeros(count, np.int32),
            factor_K=np.ones(count, np.float32),
        )
        return self.wave_inputs(own, wave, participates_K if online_K is None else online_K)

    def wave_inputs(
        self, own: ClientState, wave: Wave, online_K: NDArray[np.bool_] | None = None
    ) -> ClientInputs:
        """What the programs need of each client in a wave of the calendar.

        Args:
            own: what the clients carry, leaves [K, ...].
            wave: who does what.
            online_K: who adds a share of noise; those who send if None.
        """
        known = {
            "place": np.arange(len(self.participants), dtype=np.int32),
            "weight": self._beforehand_K * wave.factor_K,
            "trains": wave.trains_K,
            "participates": wave.sends_K,
            "online": wave.sends_K if online_K is None else online_K,
            "rank": np.array(self.ranks, np.int32),
            "steps": self.steps_K,
            "batch": self.batch_K,
            "turn": wave.turn_K,
            "lands": wave.lands_K,
            "fresh": wave.fresh_K,
            "merged": wave.merged_KxP,
        }
        state = self._layout.spread(own)
        return ClientInputs(table=self._tables, state=state, **self._layout.shard(known))
