"""How many clients run at once on a device, and what happens when memory runs out."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.federation import Federation, Masked
from fedjax_llm.federation.engine import Engine

Build = Callable[..., Federation]


def same_bytes(one: Any, other: Any) -> bool:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(leaves, others, strict=True)
    )


def out_of_memory(federation: Federation, monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Its training program fails as a device does; returns the clients at once of each failure."""
    failed: list[int] = []

    def fails(*given: Any, **settings: Any) -> Any:
        failed.append(federation.clients_at_once)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(federation._programs[0], name, fails)
    return failed


@pytest.mark.parametrize(("sum_mode", "name"), [(None, "round"), (Masked(), "train_and_send")])
def test_out_of_memory_halves_the_clients_at_once_and_nothing_is_lost(
    federate: Build, monkeypatch: pytest.MonkeyPatch, sum_mode: Any, name: str
) -> None:
    mode = {} if sum_mode is None else {"sum_mode": sum_mode}
    one = {"devices": jax.devices()[:1]}
    federation = federate(**mode, **one, clients_at_once=2)
    failed = out_of_memory(federation, monkeypatch, name)
    state, report = federation.run_round(federation.init())
    assert failed == [2]
    assert report.clients_at_once == federation.clients_at_once == 1
    alone = federate(**mode, **one, clients_at_once=1)
    expected, _ = alone.run_round(alone.init())
    assert same_bytes(state, expected)


def test_one_client_that_does_not_fit_is_an_error_with_a_remedy(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate(clients_at_once=1)
    out_of_memory(federation, monkeypatch, "round")
    with pytest.raises(UserError, match="lower microbatch"):
        federation.run_round(federation.init())


def test_a_state_that_was_given_away_is_not_used_again(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate(clients_at_once=2)

    def takes_and_fails(base: Any, server: Any, *given: Any) -> Any:
        for leaf in jax.tree.leaves(server):
            leaf.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    monkeypatch.setattr(federation._programs[0], "last_round", takes_and_fails)
    state = federation._engine.layout.replicate(federation.init())
    with pytest.raises(UserError, match="clients_at_once = 1"):
        federation.run_round(state, donate=True)


def test_other_failures_of_a_device_are_not_taken_for_memory(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate(clients_at_once=2)

    def fails(*given: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(federation._programs[0], "round", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        federation.run_round(federation.init())
    assert federation.clients_at_once == 2


@pytest.mark.optimised
def test_as_many_clients_run_at_once_as_fit_by_the_compiled_programs(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate(clients_at_once=1, devices=jax.devices()[:1])
    engine, state = federation._engine, federation.init()
    # Each program is compiled once for all that follows.
    bytes_of = {group: engine.at_once(group).bytes(state, True) for group in (1, 2, 3)}
    one, two = bytes_of[1], bytes_of[2]
    monkeypatch.setattr(Engine, "bytes", lambda engine, *_: bytes_of[engine.layout.group])
    assert two > one
    assert engine.fitted(state, round(two / 0.9) + 1, True).layout.group == 2
    assert engine.fitted(state, 100 * two, True).layout.group == 3
    with pytest.raises(UserError, match="one client takes"):
        engine.fitted(state, one, True)


@pytest.mark.optimised
def test_a_donated_state_ends_in_the_same_bytes(federate: Build) -> None:
    kept, given = federate(), federate()
    expected, _ = kept.run_round(kept.init())
    found, _ = given.run_round(given.init(), donate=True)
    assert same_bytes(found, expected)


def test_a_round_moves_nothing_to_the_devices_unasked(federate: Build) -> None:
    """State, tables and inputs are put there on purpose, once: no program is fed from the host."""
    federation = federate(devices=jax.devices()[:1])
    state, _ = federation.run_round(federation.init())
    with jax.transfer_guard_host_to_device("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.jit(lambda x: x + x)(np.ones(3))
        state, _ = federation.run_round(state)
    assert int(state.round) == 2
