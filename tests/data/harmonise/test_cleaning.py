"""Cleaning keeps what a reader sees; filters and labels decide by the row alone and count it."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Record
from fedjax_llm.data.harmonise import (
    LabelMap,
    LengthLimits,
    align_labels,
    clean_records,
    clean_text,
    filter_languages,
    filter_lengths,
    language_of,
    read_label_map,
)
from fedjax_llm.data.harmonise.labels import fold_label
from fedjax_llm.errors import UserError

TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            "ab \t\n\r\x0b\x85\xa0\xad\u200b\u200d\u2028\u202e\u2067\u3000\ufeffe\u0301½²"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


@given(TEXTS)
def test_cleaning_is_idempotent_and_leaves_nothing_it_says_it_removes(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned == unicodedata.normalize("NFC", cleaned)
    assert not {unicodedata.category(c) for c in cleaned if c not in "\t\n"} & {"Cc", "Zl", "Zp"}
    assert not set(cleaned) & set("\xa0\u3000\xad\u200b\u2060\ufeff\u202e\u2067")
    assert "\n\n\n" not in cleaned
    assert not any(line != line.rstrip(" \t") for line in cleaned.split("\n"))


@given(TEXTS)
def test_cleaning_keeps_every_letter_digit_and_sign(text: str) -> None:
    def strong(value: str) -> list[str]:
        decomposed = unicodedata.normalize("NFD", value)
        return [c for c in decomposed if unicodedata.category(c)[0] in "LNPS"]

    assert strong(clean_text(text)) == strong(text)


def test_what_nfkc_would_change_stays() -> None:
    assert clean_text("10² mg, ½ tablet, ﬁne") == "10² mg, ½ tablet, ﬁne"


def test_indentation_tabs_and_joiners_stay() -> None:
    code = "def f(x):\n    return\tx"
    assert clean_text(code) == code
    assert clean_text("می\u200cخواهم") == "می\u200cخواهم"


def test_rows_without_anything_visible_go_and_are_counted() -> None:
    records = [
        Record("q\u00a0 1", "a"),
        Record("q", "\u200b\ufeff"),
        Record("\u200b", "a"),
        Record("", "plain text"),
        Record("same", "same"),
    ]
    kept, step = clean_records(records)
    assert kept == [Record("q 1", "a"), Record("", "plain text"), Record("same", "same")]
    assert (step.rows_in, step.rows_out, step.changed) == (5, 3, 1)
    assert step.dropped == {
        "nothing visible in the answer": 1,
        "nothing visible in the prompt": 1,
    }


@given(
    st.lists(st.text("ab", min_size=1, max_size=12), max_size=12),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_lengths_match_their_definition(texts: list[str], low: int, more: int) -> None:
    records = [Record("", text) for text in texts]
    limits = LengthLimits(min_characters=low, max_characters=low + more)
    kept, step = filter_lengths(records, limits, None)
    assert kept == [r for r in records if low <= len(r.answer) <= low + more]
    assert step.rows_out == len(kept)


def test_tokens_are_counted_over_all_parts() -> None:
    records = [Record("a b", "c"), Record("a b", "c d", "e f")]
    kept, step = filter_lengths(records, LengthLimits(max_tokens=3), lambda t: [0] * len(t.split()))
    assert kept == records[:1]
    assert step.dropped == {"longer than 3 tokens": 1}
    with pytest.raises(UserError, match="need a tokenizer"):
        filter_lengths(records, LengthLimits(max_tokens=3), None)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_characters": 0}, "min_characters must be at least 1"),
        ({"min_tokens": 9, "max_tokens": 3}, "lower min_tokens"),
    ],
)
def test_bounds_that_drop_everything_are_refused(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LengthLimits(**bounds)


def test_languages_are_told_and_the_unsure_stay() -> None:
    texts = {
        "en": "The patient complains of a headache and of blurred vision since yesterday.",
        "de": "Der Patient klagt seit gestern über Kopfschmerzen und verschwommenes Sehen.",
        "fr": "Le patient se plaint de maux de tête et d'une vision trouble depuis hier.",
        "und": "12 + 4 = 16",
    }
    assert {code: language_of(text) for code, text in texts.items()} == {c: c for c in texts}
    records = [Record(text, "ok") for text in texts.values()]
    kept, step = filter_languages(records, ["en", "fr"])
    assert kept == [records[0], records[2], records[3]]
    assert step.dropped == {"in language de": 1}
    assert step.note == "1 rows kept whose language cannot be told"


@pytest.mark.parametrize(
    ("languages", "message"), [((), "is empty"), (("english",), "did you mean 'en'")]
)
def test_unknown_languages_are_named(languages: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filter_languages([], languages)


LABELS = LabelMap({"positive": ("bullish", "2"), "negative": ("bearish", "0"), "neutral": ()})


def test_labels_are_aligned_and_with_them_answers_that_are_labels() -> None:
    records = [
        Record("h", " BULLISH ", label=" BULLISH "),
        Record("h", "because of 2 reasons", label="2"),
        Record("h", "neutral", label="Neutral"),
        Record("h", "no label here"),
    ]
    aligned, step = align_labels(records, LABELS)
    assert [(r.answer, r.label) for r in aligned] == [
        ("positive", "positive"),
        ("because of 2 reasons", "positive"),
        ("neutral", "neutral"),
        ("no label here", ""),
    ]
    assert (step.changed, step.rows_out) == (3, 4)


def test_unknown_labels_are_refused_by_name_or_counted() -> None:
    records = [Record("h", "a", label=name) for name in ("positiv", "positiv", "x", "2")]
    with pytest.raises(UserError) as error:
        align_labels(records, LABELS)
    assert "'positiv' (2 rows), 'x' (1 rows)" in str(error.value)
    assert "is 'positiv' 'positive'?" in str(error.value) and "\n" not in str(error.value)
    kept, step = align_labels(records, LABELS, "drop")
    assert [r.label for r in kept] == ["positive"]
    assert step.dropped == {"unknown label 'positiv'": 2, "unknown label 'x'": 1}


@given(st.text(max_size=8), st.sampled_from([str.upper, str.lower, str.title]))
def test_a_label_is_found_under_any_case_and_spacing(name: str, change: object) -> None:
    if fold_label(name) and fold_label(name) == fold_label(change(name)):  # type: ignore[operator]
        assert LabelMap({"x": (name,)}).common(f"\t{change(name)} ") == "x"  # type: ignore[operator]


def test_a_map_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'UP' stands for 'a' and for 'b'"):
        LabelMap({"a": ("up",), "b": ("UP",)})
    file = tmp_path / "labels.toml"
    file.write_text('positive = ["bullish"]\nnegative = []\n')
    assert read_label_map(file).common("Bullish") == "positive"
    for content, message in [("positive = 3\n", "must be a list"), ("= 3", "not valid TOML")]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_label_map(file)
    with pytest.raises(UserError, match="cannot read the labels"):
        read_label_map(tmp_path / "none.toml")
