"""Rounds whose low-rank products are one Pallas kernel for all clients, interpreted on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.federation import Federation
from fedjax_llm.models import decoder
from fedjax_llm_kernels import choice, low_rank_xla

from .whole_rounds import SGD, close, product, rule, run

Build = Callable[..., Federation]


def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(choice, "BEST", {("many_adapters", kind): "pallas"})


def training(federation: Federation) -> Any:
    """The program in which all clients of a round train, traced."""
    state = federation.init()
    count = len(federation.participants)
    return federation._programs[0].train.trace(
        federation._base,
        federation.layout.replicate(state.globals),
        federation.roster.inputs(state.clients, 1, np.ones(count, bool)),
        federation._seed,
        jnp.int32(1),
    )


def kernels(federation: Federation) -> int:
    return str(training(federation).jaxpr).count("pallas_call")


@pytest.mark.parametrize("name", ["factor-averaging", pytest.param("ffa", marks=pytest.mark.drill)])
def test_a_round_has_the_kernel_where_the_table_says_so_and_learns_the_same(
    federate: Build, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    build = functools.partial(federate, training=SGD, rule=rule(name), clients_at_once=2)
    plain = build()
    state, (report,) = run(plain, rounds=1)
    with_kernel(monkeypatch)
    by_kernel = build()
    found, (found_report,) = run(by_kernel, rounds=1)
    assert kernels(by_kernel) > 0
    start = product(plain.init())
    assert close(product(found) - start, product(state) - start, 1e-4)
    np.testing.assert_allclose(found_report.loss_train_nats, report.loss_train_nats, rtol=1e-5)


def test_examples_that_are_clipped_one_by_one_have_no_kernel(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernel(monkeypatch)
    assert kernels(federate("example", clients_at_once=3)) == 0


def test_where_the_table_names_xla_the_program_is_as_if_there_were_no_kernel(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def direct(x: jax.Array, pairs: Any, scale: float) -> list[jax.Array]:
        if not pairs:
            return []
        return list(low_rank_xla.products(x, *zip(*pairs, strict=True), scale))

    asked = training(federate(clients_at_once=3)).lower().as_text()
    monkeypatch.setattr(decoder, "low_rank_matmuls", direct)
    assert training(federate(clients_at_once=3)).lower().as_text() == asked
