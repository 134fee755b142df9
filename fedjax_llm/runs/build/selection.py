"""From [secure.selective] to the parameters that are encrypted."""

from pathlib import Path

import jax.numpy as jnp

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.data import CorpusSpec, Mapping, load_records, render_all, to_batch
from fedjax_llm.errors import UserError
from fedjax_llm.federation import sensitivity
from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import Batch, Model
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.runs.sections.secure import SelectiveSection
from fedjax_llm.secure.selection import Selection, by_layers, by_sensitivity


def selection(
    run_file: RunFile,
    section: SelectiveSection,
    base: Model,
    lora: LoraConfig,
    rule: AggregationRule,
    mapping: Mapping | None,
) -> Selection:
    """Which parameters are encrypted; a map that is to be measured is measured here.

    Args:
        run_file: the run.
        section: its part that says what to encrypt.
        base: the model.
        lora: the adapter.
        rule: says what of it is trained.
        mapping: for the files of `measure_on`.

    Raises:
        UserError: patterns or a map that do not fit what is trained, unreadable or empty text.
    """
    blocks = sensitivity.trained_blocks(base.config, lora, rule)
    if section.layers is not None:
        return by_layers(blocks, section.layers)
    assert section.fraction is not None
    if section.map is not None:
        path = Path(section.map)
        return by_sensitivity(
            blocks, sensitivity.read_map(path, blocks), section.fraction, path.name
        )
    assert section.measure_on is not None
    rows = _public_rows(run_file, section, base, mapping)
    sensitivity_P = sensitivity.measure(
        base,
        lora,
        rule,
        rows,
        seed=run_file.seed,
        dtype=jnp.dtype(run_file.model.dtype),
        microbatch=run_file.training.microbatch,
    )
    names = ", ".join(Path(source).name for source in section.measure_on)
    source = f"measured on {len(rows.tokens_BxT)} rows of {names}"
    return by_sensitivity(blocks, sensitivity_P, section.fraction, source)


def _public_rows(
    run_file: RunFile, section: SelectiveSection, base: Model, mapping: Mapping | None
) -> Batch:
    """Rows of all sources alike, rendered as training rows are."""
    training, sources = run_file.training, section.measure_on
    assert sources is not None
    try:
        records, _ = load_records(CorpusSpec(sources, mapping, seed=run_file.seed))
        # Evenly spaced, because the sources follow each other.
        count = min(section.measure_rows, len(records))
        spaced = [records[k * len(records) // count] for k in range(count)]
        rendered, _ = render_all(
            spaced,
            base.tokenizer,
            training.template,
            training.sequence_length,
            training.system_prompt,
        )
        if not rendered:
            raise UserError(
                f"no row fits into {training.sequence_length} tokens with a token of its answer; "
                "raise [training] sequence_length"
            )
    except UserError as error:
        raise UserError(f"[secure.selective] measure_on: {error}") from error
    return to_batch(rendered, training.sequence_length, False, base.tokenizer.pad_id)
