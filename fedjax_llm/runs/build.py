"""From a run file to the objects of the federation. The only place that knows both."""

from pathlib import Path

import jax.numpy as jnp

from fedjax_llm.aggregation import RULES, AggregationRule
from fedjax_llm.clouds import Cloud, Link
from fedjax_llm.data import Corpus, CorpusSpec, Mapping, load_corpus
from fedjax_llm.errors import UserError
from fedjax_llm.federation import (
    Bfv,
    Ckks,
    Federation,
    Masked,
    Participant,
    Plain,
    Selective,
    SumMode,
    Threshold,
)
from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import Model, load_model
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.runs.events import Note, OnEvent, Stage
from fedjax_llm.runs.runfile import MappingSection, RunFile
from fedjax_llm.runs.selection import selection
from fedjax_llm.training import OPTIMIZERS, ExamplePrivacy, LocalTraining


def model(run_file: RunFile, on_event: OnEvent) -> Model:
    """Loads the run's base model, fetching it first when it is named and not cached."""
    from fedjax_llm.models import hub

    section = run_file.model
    if section.path is not None:
        folder = Path(section.path)
    else:
        assert section.name is not None
        folder = hub.get(section.name, on_progress=lambda text: on_event(Note(text)))
    on_event(Stage("model", section.name or folder.name))
    return load_model(folder, dtype=jnp.dtype(section.dtype))


def corpora(run_file: RunFile, base: Model, on_event: OnEvent) -> list[Corpus]:
    """Reads every cloud's data and tells what became of its rows."""
    training = run_file.training
    found = []
    for cloud in run_file.clouds:
        spec = CorpusSpec(
            sources=cloud.data.sources,
            mapping=_mapping(cloud.data.mapping),
            limit=cloud.data.limit,
            eval_fraction=cloud.data.eval_fraction,
            template=training.template,
            system=training.system_prompt,
            length=training.sequence_length,
            packing=training.packing,
            seed=run_file.seed,
        )
        corpus = load_corpus(cloud.name, spec, base.tokenizer, base.tokenizer.pad_id)
        lines = corpus.report.lines()
        on_event(Stage("data", f"{cloud.name}: {lines[0]}"))
        for line in lines[2:]:
            on_event(Note(f"{cloud.name}: {line}"))
        found.append(corpus)
    return found


def _mapping(section: MappingSection | None) -> Mapping | None:
    if section is None:
        return None
    columns = section.model_dump(exclude_none=True, exclude={"labels"})
    # `labels` translates the cells of the answer's column: numbers or codes to words.
    values = {section.answer: section.labels} if section.labels else {}
    return Mapping(**columns, values=values)


def plan(run_file: RunFile, examples: list[int]) -> PrivacyPlan:
    """The privacy plan of a run whose clouds hold `examples` training rows."""
    privacy, training = run_file.privacy, run_file.training
    if privacy.unit == "none":
        return PrivacyPlan.without_privacy(run_file.rounds, training.local_steps)
    if privacy.unit == "client":
        return PrivacyPlan.for_clients(
            len(run_file.clouds),
            rounds=run_file.rounds,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            delta=privacy.delta,
            rate=privacy.client_rate,
            weights=run_file.aggregation.weights,
        )
    if privacy.sampling == "full" and set(examples) != {training.batch_size}:
        raise UserError(
            f'[privacy] sampling = "full" takes every example in every step, but [training] '
            f"batch_size is {training.batch_size} and the clouds hold {examples} examples; make "
            'them equal, or use sampling = "poisson"'
        )
    return PrivacyPlan.for_examples(
        examples,
        expected_batch=training.batch_size,
        steps_per_round=training.local_steps,
        rounds=run_file.rounds,
        clip_norm=privacy.clip_norm,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        weights=run_file.aggregation.weights,
        packed=training.packing,
    )


def local_training(run_file: RunFile) -> LocalTraining:
    """One client's local update, as the run file describes it."""
    training, privacy = run_file.training, run_file.privacy
    return LocalTraining(
        optimizer=OPTIMIZERS[training.optimizer](training.learning_rate),
        steps=training.local_steps,
        batch_size=training.batch_size,
        microbatch=training.microbatch,
        privacy=(
            ExamplePrivacy(privacy.clip_norm, privacy.noise_multiplier)
            if privacy.unit == "example"
            else None
        ),
    )


def rule(run_file: RunFile) -> AggregationRule:
    """The aggregation rule with its server optimiser."""
    section = run_file.aggregation
    return RULES[section.rule](OPTIMIZERS[section.server_optimizer](section.server_learning_rate))


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


def sum_mode(run_file: RunFile, base: Model) -> SumMode:
    """How updates are summed; measures a sensitivity map if the run file asks for one."""
    section = run_file.secure
    if section.sum == "plain":
        return Plain()
    hidden = _HIDDEN[section.sum](section.threshold, section.minimum_clients or 2)
    selective = section.selective
    if selective is None:
        return hidden
    mapping = _mapping(selective.mapping)
    chosen = selection(run_file, selective, base, lora(run_file), rule(run_file), mapping)
    return Selective(hidden, chosen)


def federation(run_file: RunFile, base: Model, data: list[Corpus]) -> Federation:
    """Builds the federation; runs the key ceremony when the sum is encrypted."""
    training, secure = run_file.training, run_file.secure
    examples = [len(corpus.train.tokens_BxT) for corpus in data]
    at_once = training.clients_at_once
    return Federation(
        base,
        [
            Participant.from_corpus(
                Cloud(cloud.name, Link(**cloud.link.model_dump())),
                corpus,
                evaluation_rows=run_file.evaluation.examples_per_cloud,
                offline_rounds=cloud.offline_rounds,
            )
            for cloud, corpus in zip(run_file.clouds, data, strict=True)
        ],
        lora=lora(run_file),
        training=local_training(run_file),
        rule=rule(run_file),
        plan=plan(run_file, examples),
        sum_mode=sum_mode(run_file, base),
        update_bound=secure.update_bound,
        value_bits=secure.bits,
        weights=examples if run_file.aggregation.weights == "examples" else None,
        seed=run_file.seed,
        dtype=jnp.dtype(run_file.model.dtype),
        remat=training.remat,
        evaluation_microbatch=run_file.evaluation.microbatch,
        clients_at_once=None if at_once == "auto" else int(at_once),
    )
