"""From a run file, a model and its data to the federation."""

import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import RULES
from fedjax_llm.data import Corpus
from fedjax_llm.federation import Federation, FederationState, Participant, Plain
from fedjax_llm.federation.link_promises import MoreCycles
from fedjax_llm.federation.shares import mechanism_and_bits
from fedjax_llm.federation.state import init_state
from fedjax_llm.models import Model
from fedjax_llm.privacy import PrivacyPlan, secret_key
from fedjax_llm.privacy.weights import Weights as PlanWeights
from fedjax_llm.runs.build import plans
from fedjax_llm.runs.build.base_model import mesh
from fedjax_llm.runs.build.cloud_profiles import profiles
from fedjax_llm.runs.build.combining import attackers, combination, robust, rule, weights
from fedjax_llm.runs.build.local import local_training, lora
from fedjax_llm.runs.build.rows import Outline
from fedjax_llm.runs.build.sending import compression, schedule, sum_mode
from fedjax_llm.runs.sections.privacy import INTEGER
from fedjax_llm.runs.sections.schema import RunFile


def plan(run_file: RunFile, units: list[int], base: Model | None = None) -> PrivacyPlan:
    """The privacy plan of a run.

    Args:
        run_file: the settings.
        units: training rows of each client.
        base: the model; integer noise depends on how many numbers its adapter has.
    """
    privacy = run_file.privacy
    integer = None
    if privacy.unit != "none" and privacy.noise in INTEGER:
        assert base is not None
        integer, _ = mechanism_and_bits(
            base.config,
            lora(run_file),
            rule(run_file),
            plans.shares(run_file),
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            control=run_file.training.scaffold,
            bits=run_file.secure.bits,
        )
    return plans.plan(run_file, units, _plan_weights(run_file), integer)


def _plan_weights(run_file: RunFile) -> PlanWeights:
    """What the privacy plan calls the weights of the clients."""
    if RULES[run_file.aggregation.rule].weighs_by_result:
        return "result"
    kind = run_file.aggregation.weights
    return "uniform" if kind == "public" else kind


def participants(run_file: RunFile, base: Outline, data: Sequence[Corpus]) -> list[Participant]:
    """The clients of all clouds with their rows, in order."""
    return [
        client
        for cloud, profile, corpus in zip(
            run_file.clouds, profiles(run_file, base.config), data, strict=True
        )
        for client in Participant.from_corpus(
            profile,
            corpus,
            evaluation_rows=run_file.evaluation.examples_per_cloud,
            offline_rounds=cloud.offline_rounds,
            rank=cloud.rank,
            local_steps=cloud.local_steps,
            batch_size=cloud.batch_size,
        ).divided(corpus.client_rows)
    ]


def secret_noise(run_file: RunFile) -> bool:
    """Whether noise and samples come from a secret of the operating system."""
    return run_file.privacy.unit != "none" and run_file.privacy.generator == "system"


def federation(
    run_file: RunFile,
    base: Model,
    data: list[Corpus],
    secret: bytes | None = None,
    *,
    trial: bool = False,
) -> Federation:
    """Builds the federation; runs the key ceremony when the sum is encrypted.

    Args:
        run_file: the settings.
        base: the model.
        data: of each cloud.
        secret: root of noise and samples with [privacy] generator = "system".
        trial: messages are added on the devices whatever the sum is: to the same bytes, in the same
            virtual time, without keys.
    """
    if trial and secret is None and secret_noise(run_file):
        # A trial's noise is its own: that of the run must not be seen on other rounds before.
        secret = secrets.token_bytes(32)
    try:
        return _federation(run_file, run_file, base, data, secret, trial)
    except MoreCycles as more:
        # Where clouds do not wait for each other, the timeline says how often each looks at its
        # data; the plan counts that.
        planned = run_file.model_copy(update={"rounds": more.cycles})
        return _federation(run_file, planned, base, data, secret, trial)


def _federation(
    run_file: RunFile,
    planned: RunFile,
    base: Model,
    data: list[Corpus],
    secret: bytes | None,
    trial: bool,
) -> Federation:
    """As `federation`, with the privacy plan of `planned`."""
    training, secure = run_file.training, run_file.secure
    mode = sum_mode(run_file, base)
    examples = [rows for corpus in data for rows in corpus.client_rows]
    at_once = training.clients_at_once
    return Federation(
        base,
        participants(run_file, base, data),
        lora=lora(run_file),
        training=local_training(run_file, base),
        rule=rule(run_file),
        plan=plan(planned, examples, base),
        schedule=schedule(run_file),
        compression=compression(run_file),
        steps=run_file.rounds,
        # Integer noise is taken out of a hidden sum alone.
        sum_mode=Plain() if trial and run_file.privacy.noise not in INTEGER else mode,
        timed_as=mode if trial else None,
        combine=combination(run_file),
        update_bound=secure.update_bound,
        value_bits=secure.bits,
        weights=weights(run_file, data),
        attackers=attackers(run_file),
        measure_error=run_file.evaluation.aggregation_error,
        seed=run_file.seed,
        noise_key=None if secret is None else secret_key(secret),
        dtype=jnp.dtype(run_file.model.dtype),
        remat=training.remat,
        unroll=training.unroll,
        evaluation_microbatch=run_file.evaluation.microbatch,
        clients_at_once=None if at_once == "auto" else int(at_once),
        mesh=mesh(run_file),
        rows=run_file.devices.rows,
    )


def state(run_file: RunFile, base: Model) -> FederationState:
    """A state shaped like those of the run, without building its federation.

    What schedules and compression keep is not in it.
    """
    central = run_file.privacy.unit == "client"
    return init_state(
        base.config,
        lora(run_file),
        rule(run_file),
        local_training(run_file, base),
        jax.random.key(run_file.seed),
        plans.clients(run_file),
        robust(run_file),
        plans.correlation(run_file) if central else None,
        plans.adaptive(run_file) if central else None,
    )
