"""One run of real training code keeps its epsilon, and one without a clip is caught."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from fedjax_llm.audit import AuditReport, audit_clients, audit_examples
from fedjax_llm.audit.one_run import Method
from fedjax_llm.errors import UserError
from fedjax_llm.models import Batch
from fedjax_llm.training import ExamplePrivacy, LocalTraining

CLIP, NOISE, CANARIES, REAL = 0.5, 1.5, 500, 32


def examples(
    subject: Any, rows: Batch, done: ExamplePrivacy, *, batch: int = CANARIES + REAL, **changes: Any
) -> AuditReport:
    settings: dict[str, Any] = {"canaries": CANARIES, "rounds": 2, "delta": 1e-5} | changes
    return audit_examples(
        subject.row_loss,
        subject.model.base,
        subject.part,
        rows,
        LocalTraining(optax.adam(1e-3), 1, batch, 32, done),
        **settings,
    )


def test_training_with_clip_and_noise_keeps_its_epsilon(
    subject: Callable, real_rows: Batch
) -> None:
    """And the audit has power: it finds a third of the epsilon at least."""
    report = examples(subject("stories260K", 2), real_rows, ExamplePrivacy(CLIP, NOISE))
    assert report.consistent and report.unit == "example" and report.method == "f-dp"
    assert 3 < report.upper_bound < 5
    assert report.lower_bound > 0.3 * report.upper_bound


def test_training_without_the_clip_is_caught(subject: Callable, real_rows: Batch) -> None:
    """The noise is the promised one; the clip is a thousand times as long as promised."""
    done = ExamplePrivacy(1000 * CLIP, NOISE / 1000)
    claimed = ExamplePrivacy(CLIP, NOISE)
    found = examples(subject("stories260K", 2), real_rows, done, claimed=claimed, rounds=1)
    assert not found.consistent
    assert found.correct == found.guesses == CANARIES


def test_training_without_privacy_cannot_be_audited() -> None:
    training = LocalTraining(optax.sgd(1.0), 1, 4, 4)
    with pytest.raises(UserError, match=r"set LocalTraining\.privacy"):
        audit_examples(
            lambda base, part, row: jnp.sum(row),
            (),
            {"w": jnp.zeros(64)},
            jnp.zeros((4, 2)),
            training,
            canaries=4,
            rounds=1,
            delta=1e-3,
        )


def clients(**changes: Any) -> AuditReport:
    messages = {"q_proj": {"a": jax.random.normal(jax.random.key(1), (8, 2, 32, 16))}}
    settings: dict[str, Any] = {
        "canaries": CANARIES,
        "rounds": 4,
        "clip_norm": CLIP,
        "noise_multiplier": 2.0,
        "delta": 1e-5,
    }
    return audit_clients(messages, **(settings | changes))


def test_a_clipped_sum_of_clients_keeps_its_epsilon() -> None:
    report = clients()
    assert report.consistent and report.unit == "client" and report.method == "f-dp"
    assert 4 < report.upper_bound < 5
    assert report.lower_bound > 0.3 * report.upper_bound


def test_messages_longer_than_promised_are_caught() -> None:
    report = clients(codec_norm=64 * CLIP)
    assert not report.consistent and report.correct == CANARIES


def test_a_clip_four_times_as_long_as_promised_is_caught() -> None:
    assert not clients(codec_norm=4 * CLIP, noise_multiplier=4.0).consistent


@pytest.mark.parametrize("method", ["eps-delta", "f-dp"])
def test_sampled_clients_keep_their_epsilon(method: Method) -> None:
    report = clients(rate=0.25, rounds=20, noise_multiplier=1.0, method=method)
    assert report.consistent
    assert report.lower_bound > {"eps-delta": 0.1, "f-dp": 0.2}[method] * report.upper_bound


def test_sampled_clients_without_a_clip_are_caught() -> None:
    report = clients(rate=0.25, rounds=20, noise_multiplier=2.0, codec_norm=64 * CLIP)
    assert not report.consistent


def test_the_same_seed_gives_the_same_report() -> None:
    assert clients(rounds=1, canaries=50) == clients(rounds=1, canaries=50)
    assert clients(rounds=1, canaries=50) != clients(rounds=1, canaries=50, seed=1)


def test_messages_without_clients_axis_are_refused() -> None:
    with pytest.raises(UserError, match="leading axis of clients"):
        audit_clients(
            {"w": jnp.zeros(3)},
            canaries=2,
            rounds=1,
            clip_norm=1.0,
            noise_multiplier=1.0,
            delta=1e-2,
        )


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("noise", "rounds"), [(1.5, 2), (1.0, 2)])
def test_audits_of_a_thousand_canaries(
    subject: Callable, real_rows: Batch, noise: float, rounds: int, seed: int
) -> None:
    settings: dict[str, Any] = {"canaries": 1000, "batch": 1032, "rounds": rounds, "seed": seed}
    small = subject("stories260K", 4)
    clean = examples(small, real_rows, ExamplePrivacy(CLIP, noise), **settings)
    print(clean)
    assert clean.consistent and clean.lower_bound > 0.35 * clean.upper_bound
    done, claimed = ExamplePrivacy(1000 * CLIP, noise / 1000), ExamplePrivacy(CLIP, noise)
    unclipped = examples(small, real_rows, done, claimed=claimed, **settings)
    print(unclipped)
    assert not unclipped.consistent
