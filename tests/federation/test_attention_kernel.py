"""Rounds whose attention keeps no scores, its kernel interpreted on a CPU."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from fedjax_llm.federation import Federation
from fedjax_llm_kernels import choice

from .whole_rounds import SGD, close, product, rule, run

Build = Callable[..., Federation]


def test_a_round_with_the_kernel_learns_the_same(
    federate: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = functools.partial(
        federate, training=SGD, rule=rule("factor-averaging"), clients_at_once=2
    )
    plain = build()
    state, (report,) = run(plain, rounds=1)
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(choice, "BEST", {("attention", kind): "pallas"})
    found, (found_report,) = run(build(), rounds=1)
    start = product(plain.init())
    assert close(product(found) - start, product(state) - start, 1e-4)
    np.testing.assert_allclose(found_report.loss_train_nats, report.loss_train_nats, rtol=1e-5)
    # Another order of additions: the same bytes would say that nothing else ran.
    assert np.any(product(found) != product(state))
