"""From [privacy] to the privacy plan."""

import math
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import (
    AdaptiveClip,
    Banded,
    Buffered,
    Clip,
    Correlation,
    DiscreteGaussianShares,
    IntegerMechanism,
    LambdaCgd,
    PerFactor,
    PerLayer,
    PrivacyPlan,
    SkellamShares,
)
from fedjax_llm.privacy.integer_mechanism import Shares
from fedjax_llm.privacy.weights import Weights
from fedjax_llm.runs.sections.privacy import INTEGER
from fedjax_llm.runs.sections.schema import RunFile


def plan(
    run_file: RunFile, units: list[int], weights: Weights, integer: IntegerMechanism | None
) -> PrivacyPlan:
    """The privacy plan of a run.

    Args:
        run_file: the settings.
        units: training rows of each client.
        weights: what weighs the clients.
        integer: the clients' integer noise, or None.

    Raises:
        UserError, Refused: as `PrivacyPlan`; batches that do not take everyone with full sampling.
    """
    privacy, training = run_file.privacy, run_file.training
    if privacy.unit == "none":
        return PrivacyPlan.without_privacy(run_file.rounds, training.local_steps)
    settings: dict[str, Any] = {
        "rounds": run_file.rounds,
        "clip_norm": privacy.clip_norm,
        "noise_multiplier": privacy.noise_multiplier,
        "delta": privacy.delta,
        "period": privacy.period,
        "weights": weights,
        "correlation": correlation(run_file),
        "adaptive": adaptive(run_file),
        "adjacency": privacy.adjacency,
        "clip_norm_from": privacy.clip_norm_from,
        "generator": privacy.generator,
        "budget": privacy.budget,
    }
    if privacy.unit == "client":
        return PrivacyPlan.for_clients(
            clients(run_file),
            rate=privacy.client_rate,
            trust=privacy.trust or ("central" if integer is None else "distributed"),
            integer=integer,
            **settings,
        )
    batches = batch_sizes(run_file)
    if privacy.sampling == "full" and units != [own * privacy.period for own in batches]:
        of_period = f" times the period {privacy.period}" if privacy.period > 1 else ""
        alike, of_run = len(set(batches)) == 1, set(batches) == {training.batch_size}
        raise UserError(
            f'[privacy] sampling = "full" takes every {privacy.unit} in its turn, but '
            f"{'[training] ' if of_run else ''}batch_size is {batches[0] if alike else batches}"
            f"{of_period} and the clouds hold {units} "
            f'{privacy.unit}s; make them equal, or use sampling = "poisson"'
        )
    return PrivacyPlan.for_examples(
        units,
        expected_batch=batches[0] if len(set(batches)) == 1 else batches,
        steps_per_round=training.local_steps,
        unit=privacy.unit,
        packed=training.packing,
        **settings,
    )


def batch_sizes(run_file: RunFile) -> list[int]:
    """Rows that each client expects to take in a step; a public number of its cloud."""
    return [
        cloud.batch_size or run_file.training.batch_size
        for cloud in run_file.clouds
        for _ in range(cloud.clients)
    ]


def correlation(run_file: RunFile) -> Correlation | None:
    """How the noise of different steps hangs together; None is independent noise."""
    privacy = run_file.privacy
    if privacy.unit == "none":
        return None
    steps = run_file.rounds * (1 if privacy.unit == "client" else run_file.training.local_steps)
    if privacy.noise == "banded":
        if privacy.bands is None and privacy.period == 1:
            raise UserError(
                '[privacy] noise = "banded" with a turn in every step has one band, which is '
                "independent noise; set period, or bands"
            )
        return Banded(steps, privacy.bands or min(privacy.period, steps))
    if privacy.noise == "buffered":
        return Buffered(steps, privacy.buffers, privacy.period)
    if privacy.noise == "lambda-cgd":
        return LambdaCgd(steps, privacy.cancelled)
    return None


def clip(run_file: RunFile, layers: int) -> float | Clip:
    """How gradients of examples are clipped, of sensitivity `clip_norm` in all.

    Args:
        run_file: the settings.
        layers: of the model.
    """
    privacy = run_file.privacy
    if privacy.clip == "per-factor":
        return PerFactor(privacy.clip_norm / math.sqrt(2), privacy.clip_norm / math.sqrt(2))
    if privacy.clip == "per-layer":
        return PerLayer.even(privacy.clip_norm, layers)
    return privacy.clip_norm


def adaptive(run_file: RunFile) -> AdaptiveClip | None:
    """How the clip norm follows a private quantile; None where it stays."""
    privacy = run_file.privacy
    section = privacy.adaptive
    if section is None or privacy.unit == "none":
        return None
    expected = (
        clients(run_file) * privacy.client_rate / privacy.period
        if privacy.unit == "client"
        else run_file.training.batch_size
    )
    stddev = section.count_stddev or max(expected / 20, privacy.noise_multiplier)
    return AdaptiveClip(privacy.clip_norm, section.quantile, section.learning_rate, stddev)


def distributed(run_file: RunFile) -> bool:
    """Whether the clients add the noise together, inside the sum."""
    privacy = run_file.privacy
    return privacy.unit == "client" and privacy.noise in INTEGER and privacy.trust != "local"


def clients(run_file: RunFile) -> int:
    """Of all clouds."""
    return sum(cloud.clients for cloud in run_file.clouds)


def shares(run_file: RunFile) -> Shares:
    """Of the clients' integer noise; with trust "local" each share is the whole of it."""
    privacy, count = run_file.privacy, clients(run_file)
    kind = SkellamShares if privacy.noise == "skellam" else DiscreteGaussianShares
    if privacy.trust == "local":
        return kind(count, count - 1)
    own = max(cloud.clients for cloud in run_file.clouds)
    return kind(count, privacy.dropouts, own if privacy.colluding is None else privacy.colluding)
