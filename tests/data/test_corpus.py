"""One cloud's corpus, end to end: every row is used or counted, every error names the cloud."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedjax_llm.data import CorpusSpec, Mapping, group_key, load_corpus, load_records
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

MAPPING = Mapping(prompt="q", answer="a")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["medical", "finance", "general"])
def test_embedded_corpora_load(name: str, chat_tokenizer: Tokenizer) -> None:
    spec = CorpusSpec((f"builtin:{name}",), limit=200, length=128, system="Answer briefly.")
    corpus = load_corpus("hospital", spec, chat_tokenizer, chat_tokenizer.pad_id)
    assert corpus.train.tokens_BxT.shape[1] == corpus.evaluation.tokens_BxT.shape[1] == 128
    assert len(corpus.train.tokens_BxT) + len(corpus.evaluation.tokens_BxT) == 200
    train, evaluation = corpus.train_records, corpus.evaluation_records
    assert not {group_key(r) for r in train} & {group_key(r) for r in evaluation}
    assert np.asarray(corpus.train.loss_mask_BxT).any(axis=1).all()
    again = load_corpus("hospital", spec, chat_tokenizer, chat_tokenizer.pad_id)
    for one, two in zip(corpus.train, again.train, strict=True):
        np.testing.assert_array_equal(one, two)


def test_packing_changes_rows_not_tokens(chat_tokenizer: Tokenizer) -> None:
    spec = CorpusSpec(("builtin:general",), limit=100, length=256)
    packed = CorpusSpec(("builtin:general",), limit=100, length=256, packing=True)
    one = load_corpus("c", spec, chat_tokenizer, 0)
    two = load_corpus("c", packed, chat_tokenizer, 0)
    assert len(two.train.tokens_BxT) < len(one.train.tokens_BxT)
    assert one.report.train == two.report.train
    assert np.sum(one.train.loss_mask_BxT) == np.sum(two.train.loss_mask_BxT)


def test_sources_are_concatenated_and_every_row_is_counted(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    write(tmp_path / "one.jsonl", [{"q": f"what {i}", "a": "cough"} for i in range(20)])
    write(
        tmp_path / "two.jsonl",
        [{"q": "empty", "a": " "}, {"q": "", "a": "x"}, {"a": "y"}, {"q": "long", "a": "z " * 400}],
    )
    spec = CorpusSpec(("one.jsonl", "two.jsonl"), MAPPING, limit=18, eval_fraction=0.25)
    corpus = load_corpus("clinic", spec, chat_tokenizer, 0, root=tmp_path)
    report = corpus.report
    assert (report.mapping.rows, report.mapping.records) == (24, 21)
    assert (report.mapping.empty_answers, report.mapping.empty_prompts) == (1, 2)
    assert report.mapping.missing == {"q": 1}
    assert report.over_limit == 3
    assert len(corpus.train_records) + len(corpus.evaluation_records) == 18
    text = "\n".join(report.lines())
    assert "1 rows dropped because the answer is empty" in text
    assert "3 records left out by limit" in text
    assert "1 rows without 'q'" in text


def test_limit_takes_the_same_records_for_the_same_seed(tmp_path: Path) -> None:
    spec = CorpusSpec(("builtin:medical",), seed=4)
    records, report = load_records(spec)
    assert len(records) == report.records == report.rows


def spec_of(**changes: object) -> CorpusSpec:
    return CorpusSpec(**({"sources": ("rows.jsonl",), "mapping": MAPPING} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (spec_of(sources=()), "no source"),
        (spec_of(sources=("gone.jsonl",)), "no such file"),
        (spec_of(sources=("builtin:law",)), "no embedded corpus 'law'"),
        (spec_of(sources=("builtin:medical",), mapping=None, limit=10**6), "lower limit"),
        (spec_of(mapping=None), "needs a mapping from its columns (q, a)"),
        (spec_of(mapping=Mapping(prompt="Q", answer="a")), "did you mean 'q'?"),
        (spec_of(limit=0), "limit must be at least 1"),
        (spec_of(limit=1), "form one group"),
        (spec_of(eval_fraction=0.0), "eval_fraction"),
        (spec_of(length=8), "raise length"),
        (spec_of(template="alpaca"), "template must be one of"),
    ],
)
def test_errors_name_the_cloud_and_are_one_line(
    tmp_path: Path, chat_tokenizer: Tokenizer, spec: CorpusSpec, expected: str
) -> None:
    write(tmp_path / "rows.jsonl", [{"q": f"what {i}", "a": "cough"} for i in range(4)])
    with pytest.raises(UserError) as info:
        load_corpus("clinic", spec, chat_tokenizer, 0, root=tmp_path)
    message = str(info.value)
    assert message.startswith("cloud 'clinic': ") and expected in message and "\n" not in message
