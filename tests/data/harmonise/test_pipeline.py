"""One cloud from its file to its batches: every row is accounted for, and off changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import CorpusSpec, Mapping, Record, load_corpus, read_cloud
from fedjax_llm.data.harmonise import (
    Harmonise,
    LabelMap,
    Ledger,
    LengthLimits,
    Likeness,
    Mix,
    Step,
    harmonise_rows,
    harmonise_sides,
)
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

MAPPING = Mapping(prompt="q", answer="a", label="label", group="g")


def dirty_rows() -> list[dict[str, str]]:
    topics = ["asthma", "gout", "measles", "anaemia", "migraine", "scurvy", "rickets", "mumps"]
    rows = [
        {"q": f"What are the usual symptoms of {t} in adults?", "a": f"See {t}.", "label": "Med"}
        for t in topics
    ]
    rows += [dict(row) for row in rows[:2]]  # exact
    rows += [row | {"q": row["q"].upper() + " "} for row in rows[2:3]]  # near
    rows += [row | {"q": row["q"].replace("adults", "adult")} for row in rows[3:5]]  # near
    rows += [{"q": "What is what?", "a": "", "label": "med"}]
    rows += [{"q": "Hi", "a": "\u200b", "label": "med"}]
    rows += [{"q": "What\u00a0is the price of gold today?", "a": "High.", "label": "fin"}]
    rows += [{"q": "?", "a": "!", "label": "med"}]
    rows += [
        {"q": "Was sind die Ursachen von Kopfschmerzen bei Kindern?", "a": "Viele.", "label": "med"}
    ]
    return [row | {"g": str(i)} for i, row in enumerate(rows)]


SETTINGS = Harmonise(
    labels=LabelMap({"medicine": ("med",), "finance": ("fin",)}),
    lengths=LengthLimits(min_characters=5),
    languages=("en",),
    likeness=Likeness("near"),
)


def spec_of(tmp_path: Path, **options: object) -> CorpusSpec:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in dirty_rows()))
    return CorpusSpec((str(file),), MAPPING, eval_fraction=0.3, length=128, **options)  # type: ignore[arg-type]


def test_every_row_is_accounted_for(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    spec = spec_of(tmp_path, harmonise=SETTINGS, limit=8)
    corpus = load_corpus("clinic", spec, chat_tokenizer, 0)
    ledger = corpus.report.ledger
    assert ledger is not None
    assert {step.name: step.dropped for step in ledger.steps if step.dropped} == {
        "mapping": {"empty answer": 1},
        "cleaning": {"nothing visible in the answer": 1},
        "length": {"shorter than 5 characters": 1},
        "language": {"in language de": 1},
        "duplicates inside the cloud": {"exact duplicates": 2, "near duplicates": 3},
        "limit": {"over the limit": 1},
    }
    assert ledger.rows_in == len(dirty_rows())
    assert ledger.rows_out == 8
    assert ledger.rows_out == len(corpus.train_records) + len(corpus.evaluation_records)
    labels = {r.label for r in (*corpus.train_records, *corpus.evaluation_records)}
    assert labels <= {"medicine", "finance"}
    text = "\n".join(corpus.report.lines())
    assert "2 rows dropped (exact duplicates)" in text
    assert text.count("empty answer") == 1  # counted once, though the mapping counts it too


def test_what_is_off_changes_nothing(chat_tokenizer: Tokenizer) -> None:
    spec = CorpusSpec(("builtin:general",), limit=60)
    nothing = Harmonise(clean=False, likeness=Likeness("off"))
    plain = load_corpus("clinic", spec, chat_tokenizer, 0)
    off = load_corpus("clinic", replace(spec, harmonise=nothing), chat_tokenizer, 0)
    assert plain.report.ledger is None
    for one, two in zip(
        (*plain.train, *plain.evaluation), (*off.train, *off.evaluation), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_row_read_once_is_not_read_again(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    spec = spec_of(tmp_path, harmonise=SETTINGS)
    read = read_cloud("clinic", spec, chat_tokenizer)
    (tmp_path / "rows.jsonl").unlink()
    corpus = load_corpus("clinic", spec, chat_tokenizer, 0, read=read)
    assert len(corpus.train_records) + len(corpus.evaluation_records) == len(read.records)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30),
    st.sampled_from(["off", "exact"]),
)
def test_no_text_is_in_training_and_in_evaluation(rows: list[tuple[int, bool]], kind: str) -> None:
    """Whatever groups or users put the copies on both sides."""
    records = [Record(f"Question {i}", "a", user=str(n)) for n, (i, _) in enumerate(rows)]
    train = [r for r, (_, held) in zip(records, rows, strict=True) if not held]
    held = [r for r, (_, out) in zip(records, rows, strict=True) if out]
    settings = Harmonise(likeness=Likeness(kind))  # type: ignore[arg-type]
    apart = [r for r in held if r.prompt not in {t.prompt for t in train}]
    if held and not apart:
        with pytest.raises(UserError, match="evaluation rows are in training too"):
            harmonise_sides(train, held, settings, 0)
        return
    kept, out, steps = harmonise_sides(train, held, settings, 0)
    # One row more in evaluation moves no training row.
    assert kept == train
    assert out == apart
    ledger = Ledger((Step("split", len(records)), *steps))
    assert ledger.rows_out == len(kept) + len(out)


def test_mixing_takes_training_rows_only(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    files = []
    for name, count in (("a", 40), ("b", 10)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"q": f"{name} asks for number {i}", "a": str(i)} for i in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(file))
    mapping = Mapping(prompt="q", answer="a")
    plain = CorpusSpec(tuple(files), mapping, eval_fraction=0.2, length=128)
    mixed = CorpusSpec(
        tuple(files),
        mapping,
        eval_fraction=0.2,
        length=128,
        harmonise=Harmonise(mix=Mix(weights={"a.jsonl": 1.0, "b.jsonl": 0.0})),
    )
    one = load_corpus("c", plain, chat_tokenizer, 0)
    two = load_corpus("c", mixed, chat_tokenizer, 0)
    assert two.evaluation_records == one.evaluation_records
    assert two.train_records == tuple(r for r in one.train_records if r.source == "a.jsonl")
    assert len(two.train.tokens_BxT) == len(two.train_records)  # what the privacy plan counts
    assert two.report.ledger is not None
    assert two.report.ledger.rows_out == len(two.train_records) + len(two.evaluation_records)


def test_filters_come_before_duplicates_so_that_no_row_is_lost_to_one_that_goes() -> None:
    """Of two near duplicates one is too long; the other stays, whichever the seed prefers."""
    short = "The patient has had a headache, a fever and a cough since the day before yesterday."
    records = [Record(short, "a"), Record(f"{short} Really.", "a"), Record("Another row.", "b")]
    for seed in range(8):
        settings = Harmonise(
            lengths=LengthLimits(max_characters=len(short) + 1),
            likeness=Likeness("near", threshold=0.5, seed=seed),
        )
        rows, steps = harmonise_rows(records, settings)
        assert rows == [records[0], records[2]]
        assert [step.name for step in steps if step.dropped] == ["length"]


def test_books_that_do_not_add_up_are_no_books() -> None:
    good = Ledger((Step("one", 9, {"why": 2}, changed=1), Step("two", 7, added=3)))
    assert (good.rows_in, good.rows_out) == (9, 10)
    assert good.lines() == ["one: 2 rows dropped (why), 1 rows changed", "two: 3 copies added"]
    assert [step["rows_out"] for step in good.to_json()] == [7, 10]
    for steps in (
        (Step("one", 9, {"why": 2}), Step("two", 8)),
        (Step("one", 1, {"why": 2}),),
        (Step("one", 1, {"why": -2}),),
    ):
        with pytest.raises(ValueError, match=r"rows left step|does not add up"):
            Ledger(steps)
