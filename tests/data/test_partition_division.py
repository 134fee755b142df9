"""A corpus divided among clouds: every row to one, and none trained on what another holds out."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data import (
    ByKey,
    Corpus,
    CorpusSpec,
    Dirichlet,
    Division,
    Iid,
    Quantity,
    ReadRows,
    Record,
    Shards,
    Way,
    divide_rows,
    group_key,
    load_corpus,
    partition_statistics,
    token_counts,
)
from fedjax_llm.data.harmonise.ledger import Ledger
from fedjax_llm.data.mapping import MappingReport
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

CLOUDS = ("one", "two", "three")


def read(records: list[Record]) -> ReadRows:
    return ReadRows(tuple(records), MappingReport(rows=len(records), records=len(records)))


def questions(count: int = 120, spellings: int = 2) -> list[Record]:
    """Questions asked in several spellings, which may have different labels."""
    return [
        Record("  " * (row % spellings) + f"Why {row // spellings}?", f"{row}", label=f"l{row % 3}")
        for row in range(count)
    ]


def corpora(
    whole: ReadRows, division: Division, tokenizer: Tokenizer, eval_fraction: float = 0.25
) -> list[Corpus]:
    parts = divide_rows(whole, CLOUDS, division, eval_fraction=eval_fraction, seed=3)
    spec = CorpusSpec((), template="plain", length=64, eval_fraction=eval_fraction, seed=3)
    return [
        load_corpus(name, spec, tokenizer, 0, read=part)
        for name, part in zip(CLOUDS, parts, strict=True)
    ]


WAYS: tuple[Way, ...] = (
    Iid(),
    Iid(granularity="rows"),
    Dirichlet(concentration=1.0),
    Dirichlet(concentration=1.0, granularity="rows"),
    Quantity(concentration=5.0),
    ByKey(key="label", granularity="rows"),
    Shards(shards=1),
    Shards(shards=2, granularity="rows"),
)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_cloud_trains_on_what_another_holds_out(way: Way, plain_tokenizer: Tokenizer) -> None:
    records = questions()
    found = corpora(read(records), Division(way, seed=5), plain_tokenizer)
    trained = {group_key(r) for corpus in found for r in corpus.train_records}
    held_out = {group_key(r) for corpus in found for r in corpus.evaluation_records}
    assert held_out and trained and not trained & held_out
    everything = [r for c in found for r in (*c.train_records, *c.evaluation_records)]
    assert Counter(everything) == Counter(records)
    if way.granularity == "groups":
        holders = Counter(
            group
            for corpus in found
            for group in {group_key(r) for r in (*corpus.train_records, *corpus.evaluation_records)}
        )
        assert set(holders.values()) == {1}


def test_single_rows_do_part_groups() -> None:
    # Otherwise the test above would say nothing about holding out once for all.
    whole = read(questions())
    parts = divide_rows(
        whole, CLOUDS, Division(Iid(granularity="rows")), eval_fraction=0.25, seed=3
    )
    shared = partition_statistics(CLOUDS, [part.records for part in parts]).shared_groups
    assert shared > 20
    parts = divide_rows(whole, CLOUDS, Division(), eval_fraction=0.25, seed=3)
    assert partition_statistics(CLOUDS, [part.records for part in parts]).shared_groups == 0


@settings(max_examples=25)
@given(
    shares=st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
    tokens=st.booleans(),
)
def test_clouds_get_their_shares_of_rows_or_tokens(
    shares: list[float], seed: int, tokens: bool
) -> None:
    records = questions(spellings=1)
    sizes = [1 + row % 9 for row in range(len(records))] if tokens else [1] * len(records)
    division = Division(Iid(), tuple(shares), seed)
    parts = divide_rows(read(records), CLOUDS, division, eval_fraction=0.1, seed=0, sizes=sizes)
    size_of = dict(zip(records, sizes, strict=True))
    for part, share in zip(parts, shares, strict=True):
        target = sum(sizes) * share / sum(shares)
        assert abs(sum(size_of[record] for record in part.records) - target) <= max(sizes)


def test_tokens_are_counted_as_a_run_renders_them(plain_tokenizer: Tokenizer) -> None:
    records = [Record("why?", "because " * n) for n in (1, 5, 200)]
    spec = CorpusSpec((), template="plain", length=64)
    short, longer, cut = token_counts(records, spec, plain_tokenizer)
    encode = plain_tokenizer.encode
    assert short == len(encode("why?\n" + "because " * 1)) + 1  # and the end token
    assert short < longer < cut == 64
    lost = Record("why? " * 200, "no token of this answer fits")
    assert token_counts([lost], spec, plain_tokenizer) == [1]


def test_a_division_of_harmonised_rows_goes_on_with_its_books() -> None:
    records = questions()
    whole = ReadRows(tuple(records), MappingReport(120, 120), ledger=Ledger())
    parts = divide_rows(whole, CLOUDS, Division(), eval_fraction=0.25, seed=0)
    assert [part.ledger and part.ledger.rows_out for part in parts] == [40, 40, 40]
    assert [part.mapping.rows for part in parts] == [40, 40, 40]
    plain = divide_rows(read(records), CLOUDS, Division(), eval_fraction=0.25, seed=0)
    assert [part.ledger for part in plain] == [None] * 3


def test_the_seed_of_the_division_moves_rows_and_not_what_is_held_out(
    plain_tokenizer: Tokenizer,
) -> None:
    def held_out(seed: int) -> tuple[set[str], list[int]]:
        found = corpora(read(questions()), Division(Iid(granularity="rows"), seed=seed), tokenizer)
        groups = {group_key(r) for corpus in found for r in corpus.evaluation_records}
        return groups, [hash(corpus.train_records) for corpus in found]

    tokenizer = plain_tokenizer
    (one, first), (two, second) = held_out(1), held_out(2)
    assert one == two and first != second


def test_an_empty_cloud_is_named() -> None:
    division = Division(Iid(), (1.0, 1.0, 1e-6))
    with pytest.raises(UserError, match="cloud 'three' would come out empty: its share of") as info:
        divide_rows(read(questions()), CLOUDS, division, eval_fraction=0.1, seed=0)
    assert "\n" not in str(info.value)


def test_a_cloud_without_rows_to_evaluate_is_named(plain_tokenizer: Tokenizer) -> None:
    # Three labels of which one is a single group: it is held out or not, as a whole.
    records = [r for r in questions(spellings=1) if r.label != "l0"]
    records += [Record("the one question", str(n), label="l0") for n in range(20)]
    division = Division(ByKey(key="label", granularity="rows"))
    with pytest.raises(UserError, match=r"cloud '\w+': none of the 20 records is for \w+, since"):
        corpora(read(records), division, plain_tokenizer)


def test_more_clouds_than_groups_are_refused() -> None:
    with pytest.raises(UserError, match="4 records in 2 groups cannot be divided among 3 clients"):
        divide_rows(read(questions(4)), CLOUDS, Division(), eval_fraction=0.5, seed=0)
