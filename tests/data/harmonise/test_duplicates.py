"""Duplicates inside a cloud, against brute force over all pairs and against plain definitions."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data import Record
from fedjax_llm.data.harmonise import Likeness, drop_duplicates, find_duplicates
from fedjax_llm.data.harmonise.duplicates import RECALL
from fedjax_llm.data.harmonise.minhash import (
    Bands,
    band_keys,
    band_values,
    choose_bands,
    signatures,
)
from fedjax_llm.data.harmonise.shingles import compared_text, mix64, shingle
from fedjax_llm.errors import UserError

WORDS = ["fever", "dose", "market", "share", "cough", "bank", "loan", "heart", "rate", "yield"]


def sentences(count: int, seed: int, words: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {i}" for i in range(count)]


def edited(text: str, edits: int, rng: random.Random) -> str:
    words = text.split()
    for _ in range(edits):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def plain_shingles(text: str, width: int = 5) -> set[str]:
    return {text[i : i + width] for i in range(max(len(text) - width + 1, 1))}


def plain_jaccard(one: str, two: str) -> float:
    a, b = plain_shingles(one), plain_shingles(two)
    return len(a & b) / len(a | b)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=2))
def test_similarity_is_that_of_the_sets_of_pieces(texts: list[str]) -> None:
    sets = shingle(texts)
    assert len(sets) == len(texts)
    for i, text in enumerate(texts):
        assert len(sets.of(i)) == len(plain_shingles(text))
    assert sets.jaccard(0, 1) == plain_jaccard(texts[0], texts[1])


def test_scrambling_is_one_to_one_on_a_sample() -> None:
    values = np.arange(200_000, dtype=np.uint64)
    assert len(np.unique(mix64(values))) == len(values)


def test_signatures_are_the_least_hash_of_each_function_whatever_the_block() -> None:
    texts = sentences(40, 1, words=400)  # more shingles than one block holds
    sets = shingle(texts)
    together = signatures(sets, 8, seed=7)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(together[i], signatures(shingle([text]), 8, seed=7)[0])


def test_agreement_of_signatures_estimates_the_similarity() -> None:
    rng = random.Random(3)
    base = sentences(1, 5, words=60)[0]
    texts = [base, *(edited(base, edits, rng) for edits in (1, 3, 6, 10, 20, 40))]
    hashes = 1024
    found = signatures(shingle(texts), hashes, seed=11)
    for i in range(1, len(texts)):
        exact = plain_jaccard(texts[0], texts[i])
        agreement = float((found[0] == found[i]).mean())
        # Five standard deviations of a binomial share.
        assert abs(agreement - exact) <= 5 * math.sqrt(max(exact * (1 - exact), 1e-3) / hashes)


def test_bands_are_equal_exactly_where_all_their_rows_are() -> None:
    rng = np.random.default_rng(0)
    signature_NxK = rng.integers(0, 2, (60, 12)).astype(np.uint32)
    bands = Bands(4, 3)
    keys, values = band_keys(signature_NxK, bands), band_values(signature_NxK, bands)
    for i, j in itertools.combinations(range(60), 2):
        for band in range(4):
            rows = slice(3 * band, 3 * band + 3)
            same = bool((signature_NxK[i, rows] == signature_NxK[j, rows]).all())
            assert same == (keys[i, band] == keys[j, band]) == (values[i][band] == values[j][band])
    assert len({value[:2] for value in values[0]}) == 4  # bands have names of their own


@given(st.integers(1, 200), st.floats(0.05, 1.0))
def test_the_longest_bands_that_keep_the_recall_are_chosen(hashes: int, threshold: float) -> None:
    try:
        bands = choose_bands(hashes, threshold, RECALL)
    except UserError:
        assert Bands(hashes, 1).probability(threshold) < RECALL
        return
    assert bands.bands * bands.rows <= hashes
    assert bands.probability(threshold) >= RECALL
    for rows in range(bands.rows + 1, hashes + 1):
        assert Bands(hashes // rows, rows).probability(threshold) < RECALL


def test_the_curve_is_that_of_independent_bands() -> None:
    bands = Bands(20, 5)
    assert bands.probability(0.5) == pytest.approx(1 - (1 - 0.5**5) ** 20)
    trials = np.random.default_rng(1).binomial(20, 0.7**5, 100_000)
    assert bands.probability(0.7, 4) == pytest.approx(float((trials >= 4).mean()), abs=0.01)
    assert bands.shared_at(0.8, 0.95) == max(
        n for n in range(1, 21) if bands.probability(0.8, n) >= 0.95
    )


def family(seed: int, originals: int = 60) -> list[Record]:
    rng = random.Random(seed)
    texts = []
    for text in sentences(originals, seed, words=30):
        texts.append(text)
        texts += [edited(text, rng.randrange(1, 6), rng) for _ in range(rng.randrange(3))]
        texts += [text.upper() + "  "] * rng.randrange(2) + [text] * rng.randrange(2)
    records = [Record(text, "yes") for text in texts]
    rng.shuffle(records)
    return records


@pytest.mark.parametrize("seed", range(3))
def test_what_stays_has_no_duplicates_and_what_goes_has_one_that_stays(seed: int) -> None:
    records = family(seed)
    likeness = Likeness("near", seed=seed)
    found = find_duplicates(records, likeness)
    texts = [compared_text(record, "record") for record in records]
    for row, other in enumerate(found.of_N.tolist()):
        if other >= 0:
            assert found.of_N[other] < 0
            assert plain_jaccard(texts[row], texts[other]) >= likeness.threshold
            assert found.exact_N[row] == (records[row].prompt == records[other].prompt)
    # Brute force: of all pairs that stay, none is alike (the bands' recall is above 0.999).
    for i, j in itertools.combinations(found.kept, 2):
        assert plain_jaccard(texts[i], texts[j]) < likeness.threshold
    assert 0 < len(found.kept) < len(records)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_what_stays_does_not_depend_on_the_order_of_the_file(rng: random.Random) -> None:
    records = family(5, originals=15)
    kept, steps = drop_duplicates(records, Likeness("near", seed=2))
    shuffled = list(records)
    rng.shuffle(shuffled)
    again, again_steps = drop_duplicates(shuffled, Likeness("near", seed=2))
    key = lambda r: (r.prompt, r.answer)  # noqa: E731
    assert sorted(kept, key=key) == sorted(again, key=key)
    assert steps == again_steps


def test_exact_is_the_same_text_and_near_does_not_see_case_and_spacing() -> None:
    records = [
        Record("What is  Asthma?", "A disease."),
        Record("What is  Asthma?", "A disease.", label="x"),
        Record("what is asthma?", "a DISEASE."),
        Record("What is  Asthma?", "Nobody can say what that may be."),
        Record("What is", " Asthma? A disease."),
    ]
    kept, (step,) = drop_duplicates(records, Likeness("exact"))
    assert len(kept) == 4 and step.dropped == {"exact duplicates": 1}
    kept, (step,) = drop_duplicates(records, Likeness("exact", compare="prompt"))
    assert len(kept) == 3 and step.dropped == {"exact duplicates": 2}
    kept, (step,) = drop_duplicates(records, Likeness("near", threshold=1.0))
    assert len(kept) == 3 and sum(step.dropped.values()) == 2
    kept, steps = drop_duplicates(records, Likeness("off"))
    assert kept == records and steps == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 9))
def test_one_row_more_changes_the_texts_that_stay_by_one_at_most(rows: list[int], new: int) -> None:
    """What a guarantee per example needs of exact duplicates."""

    def texts(numbers: list[int]) -> set[str]:
        records = [Record(f"q {n}", "a", group=str(i)) for i, n in enumerate(numbers)]
        found = find_duplicates(records, Likeness("exact"))
        stays = [records[row].prompt for row in found.kept]
        assert len(stays) == len(set(stays))
        return set(stays)

    assert texts([*rows, new]) - texts(rows) <= {f"q {new}"} and texts(rows) <= texts([*rows, new])


def test_which_copy_stays_follows_the_seed() -> None:
    pairs = [[Record(f"q {i}", "a", label=side) for side in "xy"] for i in range(64)]
    records = [record for pair in pairs for record in pair]
    stays = {
        seed: [r.label for r in drop_duplicates(records, Likeness(seed=seed))[0]] for seed in (1, 2)
    }
    assert stays[1] != stays[2]
    for labels in stays.values():
        assert 16 <= labels.count("x") <= 48  # neither the first nor the last in the file


def test_a_cloud_of_one_text_is_told_in_one_line() -> None:
    with pytest.raises(UserError) as error:
        drop_duplicates([Record("Why?", "So.")] * 9, Likeness())
    assert "all 9 rows are duplicates of 'Why?'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("likeness", "message"),
    [
        (Likeness("near", threshold=0.0), "threshold must be above 0"),
        (Likeness("near", hashes=0), "hashes must be in"),
        (Likeness("near", threshold=0.05, hashes=16), "raise hashes or threshold"),
    ],
)
def test_values_out_of_range_are_named(likeness: Likeness, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_duplicates([Record("a", "b"), Record("c", "d")], likeness)
