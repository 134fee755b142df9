"""From a run file to the objects of the federation. The only place that knows both."""

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import (
    RULES,
    SERVER_OPTIMIZERS,
    AggregationRule,
    LossWeights,
    NormalisedMean,
    Weights,
    step_norm,
)
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import COMBINES, Combine, GroupRobust
from fedjax_llm.clouds.schedules import SCHEDULES, Schedule
from fedjax_llm.compression import CODECS, Chain, Rotated
from fedjax_llm.data import (
    Corpus,
    CorpusSpec,
    Mapping,
    load_corpus,
    read_cloud,
)
from fedjax_llm.errors import UserError
from fedjax_llm.federation import (
    Attackers,
    Bfv,
    Ckks,
    Combination,
    Compression,
    Federation,
    FederationState,
    Masked,
    Participant,
    Plain,
    Selective,
    SumMode,
    Threshold,
)
from fedjax_llm.federation.link_promises import (
    MoreCycles,
)
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.federation.promises import fewest_clouds
from fedjax_llm.federation.shares import mechanism_and_bits
from fedjax_llm.federation.state import init_state
from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import DecoderConfig, Model, Tokenizer, load_config, load_model
from fedjax_llm.models.sharding import check_sizes
from fedjax_llm.privacy import PrivacyPlan, secret_key
from fedjax_llm.privacy.weights import Weights as PlanWeights
from fedjax_llm.runs import dividing, harmonising, plans
from fedjax_llm.runs.cloud_profiles import profiles
from fedjax_llm.runs.events import Note, OnEvent, Stage
from fedjax_llm.runs.runfile_privacy import INTEGER
from fedjax_llm.runs.runfile_schedule import CODEC_KEYS
from fedjax_llm.runs.runfile_schema import RunFile
from fedjax_llm.runs.runfile_types import MappingSection
from fedjax_llm.runs.selection import selection
from fedjax_llm.training import MOMENTUM, OPTIMIZERS, Drift, ExamplePrivacy, LocalTraining

LABEL_FLIP = "label-flip"


def model_folder(run_file: RunFile, on_event: OnEvent) -> Path:
    """The folder of the run's base model, fetched first when it is named and not cached."""
    from fedjax_llm.models import hub

    section = run_file.model
    if section.path is not None:
        return Path(section.path)
    assert section.name is not None
    return hub.get(section.name, on_progress=lambda text: on_event(Note(text)))


def model(run_file: RunFile, on_event: OnEvent) -> Model:
    """Loads the run's base model, fetching it first when it is named and not cached."""
    section, folder = run_file.model, model_folder(run_file, on_event)
    on_event(Stage("model", section.name or folder.name))
    mesh, kept = run_file.devices.mesh, section.weights or section.dtype
    check_sizes(load_config(folder), mesh.data, mesh.model)
    with _on_host() if mesh.data * mesh.model > 1 else contextlib.nullcontext():
        if kept == "float32" or kept == "bfloat16":
            return load_model(folder, dtype=jnp.dtype(kept))
        return load_model(folder, dtype=jnp.dtype(section.dtype), quantised=kept)


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """Arrays are made in the host's memory: a model that is cut may fit on no device as a whole."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "[devices] mesh cuts the weights, which pass through the host's memory, and "
            "JAX_PLATFORMS leaves out the CPU; add cpu to it, at the end"
        ) from None
    return jax.default_device(host)


def mesh(run_file: RunFile) -> MeshShape:
    """How the devices are divided."""
    found = run_file.devices.mesh
    return MeshShape(found.clouds, found.data, found.model)


def check_devices(run_file: RunFile) -> None:
    """Refuses a mesh that the devices of this run do not fill, before anything is loaded.

    Raises:
        UserError: as said.
    """
    mesh(run_file).over(jax.devices())


class Outline(Protocol):
    """What the data need of a model; `Model` has it, and weights besides."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


def corpora(run_file: RunFile, base: Outline, on_event: OnEvent) -> list[Corpus]:
    """Reads every cloud's data and tells what became of its rows."""
    training, attack = run_file.training, run_file.attack
    harmonising.check_tokenizers(run_file, base.tokenizer)
    steps = harmonising.settings(run_file)
    specs = {
        cloud.name: CorpusSpec(
            sources=data.sources,
            mapping=_mapping(data.mapping),
            limit=data.limit,
            eval_fraction=data.eval_fraction,
            template=training.template,
            system=training.system_prompt,
            length=training.sequence_length,
            packing=training.packing,
            by_user=run_file.privacy.unit == "user",
            seed=run_file.seed,
            clients=cloud.clients,
            partition=dividing.way(cloud.partition, cloud),
            flipped=attack is not None
            and attack.name == LABEL_FLIP
            and cloud.name in attack.clouds,
            harmonise=steps[cloud.name],
        )
        for cloud in run_file.clouds
        if (data := cloud.data or run_file.partition) is not None
    }
    if run_file.partition is None:
        rows = {name: read_cloud(name, spec, base.tokenizer) for name, spec in specs.items()}
    else:
        # What is read and how it is rendered is the same for all clouds.
        whole = specs[run_file.clouds[0].name]
        rows = dividing.divided(run_file, whole, base.tokenizer, base.config, on_event)
    rows = harmonising.without_common(run_file, rows, on_event)
    found = []
    for name, spec in specs.items():
        corpus = load_corpus(name, spec, base.tokenizer, base.tokenizer.pad_id, read=rows[name])
        lines = corpus.report.lines()
        on_event(Stage("data", f"{name}: {lines[0]}"))
        for line in lines[2:]:
            on_event(Note(f"{name}: {line}"))
        found.append(corpus)
    return found


def _mapping(section: MappingSection | None) -> Mapping | None:
    if section is None:
        return None
    columns = section.model_dump(exclude_none=True, exclude={"labels"})
    # `labels` translates the cells of the answer's column: numbers or codes to words.
    values = {section.answer: section.labels} if section.labels else {}
    return Mapping(**columns, values=values)


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


def local_training(run_file: RunFile, base: Model) -> LocalTraining:
    """One client's local update, as the run file describes it, on a model."""
    training, privacy = run_file.training, run_file.privacy
    gradients = run_file.aggregation.exchange == "gradients"
    return LocalTraining(
        # A step of sgd at rate 1 is minus the gradient: the server's optimiser takes the real one.
        optimizer=(
            OPTIMIZERS["sgd"](1.0)
            if gradients
            else OPTIMIZERS[training.optimizer](training.learning_rate)
        ),
        steps=training.local_steps,
        batch_size=training.batch_size,
        microbatch=training.microbatch,
        privacy=(
            ExamplePrivacy(
                plans.clip(run_file, base.config.num_layers),
                privacy.noise_multiplier,
                plans.correlation(run_file),
                privacy.period,
                plans.adaptive(run_file),
                privacy.gradients,
            )
            if privacy.unit in ("example", "user")
            else None
        ),
        drift=drift(run_file),
        keeps_optimizer=training.keep_optimizer,
    )


def drift(run_file: RunFile) -> Drift:
    """What keeps the clients from drifting apart."""
    return Drift(run_file.training.proximal, run_file.training.scaffold)


def _plan_weights(run_file: RunFile) -> PlanWeights:
    """What the privacy plan calls the weights of the clients."""
    if RULES[run_file.aggregation.rule].weighs_by_result:
        return "result"
    kind = run_file.aggregation.weights
    return "uniform" if kind == "public" else kind


def rule(run_file: RunFile) -> AggregationRule:
    """The aggregation rule with its server optimiser."""
    section = run_file.aggregation
    optimizer = SERVER_OPTIMIZERS[section.server_optimizer](section.server_learning_rate)
    return RULES[section.rule](optimizer)


def combination(run_file: RunFile) -> Combination | None:
    """How messages, or the sums of groups, are combined; None is the mean."""
    section = run_file.aggregation
    if section.combine == "mean":
        return None
    if section.combine == "normalised":
        return NormalisedMean()
    robust = COMBINES[section.combine](section.byzantine, section.radius)
    return robust if section.groups is None else GroupRobust(section.groups, robust)


def robust(run_file: RunFile) -> Combine | GroupRobust | None:
    """The robust combination, which may carry a memory; None for the means."""
    found = combination(run_file)
    return None if isinstance(found, NormalisedMean) else found


def weights(run_file: RunFile, data: Sequence[Corpus]) -> Weights | LossWeights:
    """What each client counts in the mean."""
    section, training = run_file.aggregation, run_file.training
    if section.weights in ("loss", "loss-bounded"):
        own = section.loss_weights
        bound = own.bound if section.weights == "loss-bounded" else None
        return LossWeights(own.alpha, bound, own.loss, own.rows, own.up_mbps)
    clients = [
        (cloud, corpus, k)
        for cloud, corpus in zip(run_file.clouds, data, strict=True)
        for k in range(cloud.clients)
    ]
    values: list[float] | None = None
    if section.weights == "public":
        values = [cloud.weight for cloud, _, _ in clients]
    elif section.weights == "examples":
        values = [corpus.client_rows[k] for _, corpus, k in clients]
    elif section.weights == "tokens":
        values = [_answer_tokens(corpus, k) for _, corpus, k in clients]
    norms = None
    if section.normalise_steps:
        momentum = MOMENTUM.get(training.optimizer, 0.0)
        norms = [
            step_norm(cloud.local_steps or training.local_steps, momentum)
            for cloud, _, _ in clients
        ]
    kind = section.weights if section.weights in ("examples", "tokens") else "uniform"
    return Weights.of(values, len(clients), norms=norms, kind=kind)


def _answer_tokens(corpus: Corpus, client: int) -> int:
    first = sum(corpus.client_rows[:client])
    rows = corpus.train.loss_mask_BxT[first : first + corpus.client_rows[client]]
    return int(rows.sum())


def attackers(run_file: RunFile) -> Attackers | None:
    """The clients that send something else than what they trained; a label flip is in the data."""
    attack = run_file.attack
    if attack is None or attack.name == LABEL_FLIP:
        return None
    malicious = tuple(
        cloud.name in attack.clouds for cloud in run_file.clouds for _ in range(cloud.clients)
    )
    return Attackers(ATTACKS[attack.name], malicious, attack.scale)


def schedule(run_file: RunFile) -> Schedule:
    """When the server waits for whom."""
    section = run_file.schedule
    names = {"grace_seconds": "grace", "staleness_exponent": "exponent"}
    given = section.model_dump(exclude={"name"}, exclude_none=True)
    settings = {names.get(key, key): value for key, value in given.items()}
    return SCHEDULES[section.name](**settings)


def compression(run_file: RunFile) -> Compression | None:
    """How messages are shortened; None where they are sent whole."""
    section = run_file.compression
    if section is None:
        return None
    keys = {key for key in CODEC_KEYS[section.codec] if getattr(section, key) is not None}
    codec = CODECS[section.codec](**section.model_dump(include=keys))
    if section.rotate:
        codec = Chain((codec, Rotated()))
    return Compression(codec, section.error_feedback, section.rounding, section.broadcast)


def lora(run_file: RunFile) -> LoraConfig:
    """Rank, alpha and targets."""
    section = run_file.adapter
    return LoraConfig(section.rank, section.alpha, tuple(section.targets))


_HIDDEN: dict[str, type[Masked | Threshold | Bfv | Ckks]] = {
    "masked": Masked,
    "threshold": Threshold,
    "bfv": Bfv,
    "ckks": Ckks,
}


def fewest_opened(run_file: RunFile) -> int:
    """The fewest clouds whose sum is opened."""
    least = 2
    if plans.distributed(run_file):
        sizes = [cloud.clients for cloud in run_file.clouds]
        least = max(least, fewest_clouds(sizes, run_file.privacy.dropouts))
    return run_file.secure.minimum_clients or least


def sum_mode(run_file: RunFile, base: Model) -> SumMode:
    """How updates are summed; measures a sensitivity map if the run file asks for one."""
    section = run_file.secure
    if section.sum == "plain":
        return Plain()
    hidden = _HIDDEN[section.sum](section.threshold, fewest_opened(run_file))
    selective = section.selective
    if selective is None:
        return hidden
    mapping = _mapping(selective.mapping)
    chosen = selection(run_file, selective, base, lora(run_file), rule(run_file), mapping)
    return Selective(hidden, chosen)


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
