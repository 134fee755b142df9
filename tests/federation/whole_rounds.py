"""What the tests of whole rounds share: a rule by its name, rounds, and what came of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.aggregation import RULES
from fedjax_llm.federation import Federation, FederationState, Participant, RoundReport
from fedjax_llm.training import LocalTraining

SGD = LocalTraining(optax.sgd(0.5), 2, 6, 4)
FINE: dict[str, Any] = {"training": SGD, "update_bound": 4.0, "value_bits": 27}


def rule(name: str, rate: float = 1.0) -> Any:
    return RULES[name](optax.sgd(rate))


def run(federation: Federation, rounds: int = 2) -> tuple[FederationState, list[RoundReport]]:
    states = list(federation.rounds(federation.init(), rounds))
    return states[-1][0], [report for _, report in states]


def same_bytes(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


def product(state: FederationState) -> np.ndarray:
    adapter = state.server.adapter
    parts = []
    for name, (a, b) in adapter.factors.items():
        dense = adapter.scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        parts.append(dense + np.asarray(state.server.residual.get(name, 0.0), np.float64))
    return np.concatenate([part.ravel() for part in parts])


def close(one: np.ndarray, other: np.ndarray, error: float) -> bool:
    return bool(np.linalg.norm(one - other) <= error * np.linalg.norm(other))


def changes_of(federation: Federation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each client of ffa trains in round 1, its loss, and its rows: [K, P], [K], [K]."""
    state, count = federation.init(), len(federation.participants)
    local = federation._programs[0].train(
        federation._base,
        federation.layout.replicate(state.globals),
        federation.roster.inputs(state.clients, 1, np.ones(count, bool)),
        federation._seed,
        jnp.int32(1),
    )
    changes = [
        np.asarray(sides["b"])[:count] - np.asarray(state.server.adapter.factors[name].b_LxRxF)
        for name, sides in local.after.items()
    ]
    flat_KxP = np.concatenate([change.reshape(count, -1) for change in changes], axis=1)
    metrics = jax.device_get(local.metrics)
    losses_K = (metrics.loss_sum[:count] / metrics.rows[:count]).astype(np.float64)
    rows_K = np.array([p.rows for p in federation.participants], np.float64)
    return flat_KxP.astype(np.float64), losses_K, rows_K


def update_of(federation: Federation) -> np.ndarray:
    start = federation.init()
    state, _ = federation.run_round(start)
    return np.concatenate(
        [
            np.ravel(new.b_LxRxF - start.server.adapter.factors[name].b_LxRxF)
            for name, new in state.server.adapter.factors.items()
        ]
    ).astype(np.float64)


def hybrid(clouds: list[Participant]) -> list[Participant]:
    """The first cloud as two clients, the others as they are."""
    return clouds[0].divided((9, 11)) + clouds[1:]


def many(make_participants: Callable[..., list[Participant]], count: int = 6) -> list[Participant]:
    """Clients of one task, as clouds of their own."""
    source = make_participants()[1]
    parts = source.divided((5,) * (count - 1) + (32 - 5 * (count - 1),))
    return [
        dataclasses.replace(p, cloud=dataclasses.replace(p.cloud, name=f"c{k}"), client=None)
        for k, p in enumerate(parts)
    ]
