"""Mixing: shares as asked for, each row decided by itself, nothing uncounted."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Record
from fedjax_llm.data.harmonise import Mix, mix_records
from fedjax_llm.data.harmonise.mixing import rates
from fedjax_llm.errors import UserError

SIZES = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 500), min_size=1)


def rows_of(sizes: dict[str, int]) -> list[Record]:
    return [Record(f"q {d} {i}", "a", source=d) for d, size in sizes.items() for i in range(size)]


@given(SIZES, st.floats(1, 50), st.booleans())
def test_shares_follow_the_temperature(
    sizes: dict[str, int], temperature: float, repeat: bool
) -> None:
    found = rates(sizes, Mix(temperature=temperature, repeat=repeat))
    rows = {domain: rate * sizes[domain] for domain, rate in found.items()}
    raw = {domain: size ** (1 / temperature) for domain, size in sizes.items()}
    for domain in sizes:
        share = raw[domain] / sum(raw.values())
        assert rows[domain] / sum(rows.values()) == pytest.approx(share)
    if repeat:
        assert sum(rows.values()) == pytest.approx(sum(sizes.values()))
    else:
        assert max(found.values()) == pytest.approx(1.0) and max(found.values()) <= 1.0


def test_a_temperature_of_one_changes_nothing() -> None:
    records = rows_of({"a": 30, "b": 70})
    kept, (step,) = mix_records(records, Mix(temperature=1.0), seed=0)
    assert kept == records and not step.dropped and not step.added


def test_counts_are_near_the_rates_and_all_rows_are_counted() -> None:
    records = rows_of({"a": 4000, "b": 1000})
    mix = Mix(weights={"a": 1.0, "b": 1.0})
    kept, (step,) = mix_records(records, mix, seed=1)
    count = Counter(record.source for record in kept)
    assert count["b"] == 1000
    assert abs(count["a"] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    assert step.rows_in == 5000 and step.rows_out == len(kept)
    assert step.dropped == {"left out of source 'a'": 4000 - count["a"]}
    repeated, (step,) = mix_records(records, Mix(weights={"a": 1, "b": 1}, repeat=True), seed=1)
    count = Counter(record.source for record in repeated)
    assert abs(count["a"] - 2500) < 160 and abs(count["b"] - 2500) < 160
    assert step.rows_out == len(repeated) and step.added > 1000
    assert step.note == "up to 3 copies of a row"


def weighed(rows: int) -> list[Record]:
    many = [Record(f"q {i}", "a", label="x") for i in range(rows)]
    return many + [Record(f"r {i}", "a", label="y") for i in range(10)]


@given(st.integers(10, 80), st.integers(0, 99), st.randoms(use_true_random=False))
def test_what_becomes_of_a_row_is_its_own_affair(rows: int, seed: int, rng: object) -> None:
    mix = Mix(by="label", weights={"x": 1.0, "y": 1.0})
    kept = Counter(map(str, mix_records(weighed(rows), mix, seed)[0]))
    shuffled = weighed(rows)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kept == Counter(map(str, mix_records(shuffled, mix, seed)[0]))
    # A row more lowers the rate of its domain, a public number; nobody's place is taken by rank,
    # so that whoever is left was there before.
    after = Counter(map(str, mix_records(weighed(rows + 1), mix, seed)[0]))
    new = str(weighed(rows + 1)[rows])
    assert all(count <= kept[row] for row, count in after.items() if row != new)


def test_equal_rows_are_decided_one_by_one() -> None:
    records = [Record("same", "row", label="x")] * 1000 + [Record("other", "row", label="y")] * 300
    kept, _ = mix_records(records, Mix(by="label", weights={"x": 1.0, "y": 1.0}), seed=3)
    assert 200 < sum(record.label == "x" for record in kept) < 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither is given"),
        ({"temperature": 2.0, "weights": {"a": 1.0}}, "both are given"),
        ({"temperature": 0.5}, "temperature must be at least 1, got 0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 1"),
        ({"weights": {"a": -1.0}}, "weight of 'a' must be at least 0"),
        ({"weights": {"a": 0.0}}, "all weights are 0"),
    ],
)
def test_contradictions_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mix(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "source 'b' has no weight; weights must name a, b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "source 'c' is in no row"),
    ],
)
def test_weights_name_the_domains(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix_records(rows_of({"a": 2, "b": 2}), Mix(weights=weights), 0)


def test_a_domain_can_be_left_out_and_not_all() -> None:
    records = rows_of({"a": 5, "b": 5})
    kept, _ = mix_records(records, Mix(weights={"a": 1.0, "b": 0.0}), 0)
    assert kept == records[:5]
    with pytest.raises(UserError, match="no row has a label"):
        mix_records(records, Mix(by="label", temperature=2.0), 0)
