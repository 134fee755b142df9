"""The public corpora of ../shared go through the same path as a user's files."""

from pathlib import Path

import numpy as np
import pytest

from fedjax_llm.data import (
    CorpusSpec,
    Mapping,
    group_key,
    load_corpus,
    load_records,
    split_by_group,
)
from fedjax_llm.models.tokenizer import Tokenizer

MEDICAL = CorpusSpec(
    ("medical/medquad.jsonl.gz",), Mapping(prompt="prompt", answer="answer", label="qtype")
)
FINANCE = CorpusSpec(
    ("finance/fpb_50agree.jsonl.gz", "finance/tfns.jsonl.gz"),
    Mapping(
        prompt="{prompt}\nIs the sentiment negative, neutral or positive?",
        answer="label",
        label="label",
        group="prompt",
    ),
)
GENERAL = CorpusSpec(
    ("general/dolly15k.jsonl.gz",),
    Mapping(prompt="prompt", answer="answer", context="context", label="category"),
)


@pytest.mark.parametrize(
    ("spec", "rows"), [(MEDICAL, 16407), (FINANCE, 4846 + 11931), (GENERAL, 15011)]
)
def test_every_row_is_mapped_and_no_question_is_on_both_sides(
    shared: Path, spec: CorpusSpec, rows: int
) -> None:
    records, report = load_records(spec, shared / "data")
    assert report.rows == report.records == rows
    train, evaluation = split_by_group(records, 0.1, seed=0)
    assert not {group_key(r) for r in train} & {group_key(r) for r in evaluation}
    assert not {r.prompt for r in train} & {r.prompt for r in evaluation}
    assert abs(len(evaluation) / rows - 0.1) < 0.002


@pytest.mark.parametrize("spec", [MEDICAL, FINANCE, GENERAL])
def test_real_rows_become_batches(
    shared: Path, smollm2_tokenizer: Tokenizer, spec: CorpusSpec
) -> None:
    spec = CorpusSpec(spec.sources, spec.mapping, limit=200, length=128, packing=True)
    corpus = load_corpus("c", spec, smollm2_tokenizer, smollm2_tokenizer.pad_id, shared / "data")
    train, evaluation = corpus.report.train_rendering, corpus.report.evaluation_rendering
    assert train.records + evaluation.records == 200
    mask_BxT = np.asarray(corpus.train.loss_mask_BxT)
    assert int(mask_BxT.sum()) == corpus.report.train.target_tokens
