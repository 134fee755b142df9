"""[partition] in a run file: what it divides, what it refuses, and what the command line tells."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from fedjax_llm import cli
from fedjax_llm.data import Corpus, group_key
from fedjax_llm.data.partition import KEYS, Granularity
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs import runfile
from fedjax_llm.runs.preview import partition_report
from fedjax_llm.runs.sections import partition as section

HEAD = """\
name = "divided"
rounds = 1
seed = 4
model.path = "{model}"
training.template = "plain"
training.sequence_length = 128
adapter.rank = 2

[partition]
sources = ["builtin:general", "builtin:finance"]
limit = 400
eval_fraction = 0.2
"""
CLOUDS = """
[[clouds]]
name = "slow"
compute.tokens_per_second = 1000.0

[[clouds]]
name = "fast"
compute.tokens_per_second = 3000.0
"""


@pytest.fixture
def file(tmp_path: Path, stories260k: Path) -> Path:
    path = tmp_path / "divided.toml"
    path.write_text(HEAD.format(model=stories260k) + CLOUDS)
    return path


def loaded(file: Path, *overrides: str) -> list[Corpus]:
    return partition_report.corpora(runfile.load(file, overrides), on_event=lambda event: None)


def rows(data: Sequence[Corpus]) -> list[int]:
    return [len(c.train_records) + len(c.evaluation_records) for c in data]


def tokens(data: Sequence[Corpus]) -> list[int]:
    return [client.tokens or 0 for client in partition_report.statistics(data).clients]


def test_clouds_get_equal_parts_of_one_corpus(file: Path) -> None:
    data = loaded(file)
    assert [corpus.name for corpus in data] == ["slow", "fast"]
    assert sum(rows(data)) == 400 and abs(rows(data)[0] - 200) <= 6
    sources = {record.source for corpus in data for record in corpus.train_records}
    assert sources == {"builtin:general", "builtin:finance"}
    again = loaded(file)
    assert [c.train_records for c in data] == [c.train_records for c in again]


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_parts_follow_the_speed_of_the_clouds(file: Path, how: str) -> None:
    settings = ("partition.balance=speed", f"partition.how={how}", "partition.granularity=rows")
    assert rows(loaded(file, *settings)) == [100, 300]


def test_labels_differ_between_clouds_of_equal_size(file: Path) -> None:
    settings = ("partition.how=dirichlet", "partition.concentration=0.2")
    even = loaded(file, *settings, "partition.balance=equal", "partition.granularity=rows")
    assert rows(even) == [200, 200]
    assert partition_report.statistics(even).label_bits > 0.2
    assert abs(rows(loaded(file, *settings))[0] - 200) > 20  # where the draw decides


def test_tokens_follow_the_speed_of_the_clouds(file: Path) -> None:
    data = loaded(file, "partition.balance=speed", "partition.measure=tokens")
    slow, fast = tokens(data)
    # What is held out, a fifth, is not of exactly that share.
    assert fast / slow == pytest.approx(3, rel=0.1)
    assert [slow, fast] == [corpus.report.train.tokens for corpus in data]


def test_the_speed_of_an_instance_is_that_of_its_profile(file: Path) -> None:
    text = file.read_text().replace(
        "compute.tokens_per_second = 1000.0", "compute.peak_tflops = 1.0"
    )
    file.write_text(text.replace("compute.tokens_per_second = 3000.0", "compute.peak_tflops = 7.0"))
    data = loaded(file, "partition.balance=speed", "partition.granularity=rows")
    assert rows(data) == [50, 350]


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        (("how=key", "key=source"), "builtin:finance"),
        (("how=label",), "neutral"),
        (("how=shards", "shards=1"), None),
        (("how=quantity", "exponent=1.0"), None),
        (("how=quantity", "concentration=4.0"), None),
    ],
)
def test_every_way_runs_from_the_file(
    file: Path, settings: tuple[str, ...], holds: str | None
) -> None:
    data = loaded(file, *(f"partition.{setting}" for setting in settings))
    assert sum(rows(data)) == 400 and min(rows(data)) > 0
    if holds is not None:  # it is whole, with one of the clouds
        owners = [
            any(holds in (r.source, r.label) for r in (*c.train_records, *c.evaluation_records))
            for c in data
        ]
        assert sorted(owners) == [False, True]
    if "exponent=1.0" in settings:
        assert sorted(rows(data)) == [pytest.approx(400 / 3, abs=6), pytest.approx(800 / 3, abs=6)]


def test_the_seed_of_the_section_moves_the_rows(file: Path) -> None:
    first, other = loaded(file), loaded(file, "partition.seed=9")
    assert first[0].train_records != other[0].train_records
    everything = [
        {record for c in data for record in (*c.train_records, *c.evaluation_records)}
        for data in (first, other)
    ]
    assert everything[0] == everything[1]


def test_clients_inside_a_cloud_divide_its_part_in_every_way(file: Path) -> None:
    for settings in (
        ("partition=quantity", "exponent=2.0"),
        ("partition=shards", "shards=1"),
        ("partition=key", "key=source"),
        ("partition=iid", "granularity=rows"),
    ):
        own = [f"clouds.fast.{setting}" for setting in ("clients=2", *settings)]
        fast = loaded(file, *own)[1]
        assert len(fast.client_records) == 2 and min(fast.client_records) > 0
        assert sum(fast.client_records) == len(fast.train_records)
        if "exponent=2.0" in settings:
            low, high = sorted(fast.client_records)
            assert high / low == pytest.approx(4, rel=0.15)


def test_the_resolved_file_is_the_same_file(file: Path, tmp_path: Path) -> None:
    for overrides in ((), ("partition.how=quantity", "partition.exponent=1.5")):
        run_file = runfile.load(file, overrides)
        copy = tmp_path / "copy.toml"
        copy.write_text(runfile.to_toml(run_file))
        assert runfile.load(copy) == run_file


def test_the_names_are_those_of_the_package() -> None:
    assert get_args(section.Key) == KEYS
    assert get_args(section.Granularity) == get_args(Granularity)


@pytest.mark.parametrize(
    ("overrides", "kind", "expected"),
    [
        (
            ('clouds.slow.data={sources=["builtin:general"]}',),
            UserError,
            "[clouds.slow] data does not go with [partition]",
        ),
        (("partition.shards=3",), UserError, '[partition] shards goes with how = "shards"; remove'),
        (
            ("partition.concentration=0.1",),
            UserError,
            '[partition] concentration goes with how = "dirichlet" or "quantity"; remove it',
        ),
        (("partition.how=key",), UserError, "[partition] key is missing: say which field stays"),
        (
            ("partition.how=shards", "partition.balance=speed"),
            UserError,
            '[partition] balance has no meaning with how = "shards", which has its own sizes, got',
        ),
        (
            ("partition.how=dirichlet", "partition.measure=tokens"),
            UserError,
            '[partition] measure goes with balance = "equal" or "speed"; remove it',
        ),
        (
            ("partition.how=quantity", "partition.exponent=1.0", "partition.concentration=2.0"),
            UserError,
            "[partition] concentration does not go together with exponent; remove one",
        ),
        (
            ("partition.granularity=rows", "privacy.unit=user"),
            Refused,
            '[partition] granularity gives the rows of one user to several clouds, and unit "user"',
        ),
        (
            ("partition.key=topic", "partition.how=key"),
            UserError,
            '[partition] key must be one of "',
        ),
        (('partition.sources=["nowhere.csv"]',), UserError, "[partition] needs a mapping from col"),
        (
            ("clouds.slow.clients=2", "clouds.slow.partition=key"),
            UserError,
            "[clouds.slow] key is missing",
        ),
        (
            ("clouds.slow.shards=3",),
            UserError,
            '[clouds.slow] shards goes with partition = "shards',
        ),
        (
            ("clouds.slow.granularity=rows",),
            UserError,
            "granularity goes with clients above 1; rem",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(
    file: Path, overrides: tuple[str, ...], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind) as caught:
        runfile.load(file, overrides)
    message = str(caught.value)
    assert expected in message and "\n" not in message


def test_a_cloud_without_data_and_without_partition_is_named(file: Path) -> None:
    text = file.read_text()
    file.write_text(text[: text.index("[partition]")] + CLOUDS)
    with pytest.raises(UserError, match=r"\[clouds.slow\] has no data; give it sources, or divide"):
        runfile.load(file)


def test_rows_are_harmonised_before_they_are_divided(file: Path, tmp_path: Path) -> None:
    rows_twice = "".join(f'{{"q": "Why {n // 2}?", "a": "So."}}\n' for n in range(80))
    (tmp_path / "rows.jsonl").write_text(rows_twice)
    settings = (
        'partition.sources=["rows.jsonl"]',
        'partition.mapping={prompt="q", answer="a"}',
        "partition.granularity=rows",
    )
    assert sum(rows(loaded(file, *settings))) == 80
    data = loaded(file, *settings, "harmonise.duplicates=exact")
    assert rows(data) == [20, 20]
    assert [c.report.ledger and c.report.ledger.rows_out for c in data] == [20, 20]
    with pytest.raises(UserError, match=r"harmonise does not go with \[partition\], whose"):
        runfile.load(file, [*settings, "harmonise.clean=true", "clouds.slow.harmonise.clean=false"])


def test_a_map_measured_on_the_divided_corpus_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Why?", "a": "So."}\n')
    mapping = '{prompt="q", answer="a"}'
    selective = f'{{fraction=0.5, measure_on=["rows.jsonl"], mapping={mapping}}}'
    settings = (
        'partition.sources=["rows.jsonl"]',
        f"partition.mapping={mapping}",
        "privacy.unit=example",
        "secure.sum=threshold",
        "secure.threshold=2",
        f"secure.selective={selective}",
    )
    with pytest.raises(Refused, match='must be public text, and cloud "slow" trains on it'):
        runfile.load(file, settings)


def test_balance_by_speed_needs_the_speed_of_each_cloud(file: Path) -> None:
    file.write_text(file.read_text().replace("compute.tokens_per_second = 3000.0", ""))
    with pytest.raises(UserError, match=r"\[clouds.fast\] says nothing of its speed, which"):
        runfile.load(file, ["partition.balance=speed"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("partition.how=key", "partition.key=user"), "none of the 400 records has a user"),
        (("partition.limit=1",), "1 records in 1 groups cannot be divided among 2 clients"),
        (("partition.how=shards", "partition.shards=300"), "do not divide into 2 x 300 shards"),
        (("partition.limit=100000",), "limit = 100000, but the embedded corpora give"),
        (
            ("partition.balance=speed", "clouds.slow.compute.tokens_per_second=0.001"),
            "cloud 'slow' would come out empty: its share of 0.00% is too small",
        ),
        (("partition.concentration=1e7", "partition.how=dirichlet"), "at most 1e+06, got 1e+07"),
    ],
)
def test_what_cannot_be_divided_is_one_line(
    file: Path, overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        loaded(file, *overrides)
    message = str(caught.value)
    assert message.startswith("[partition]: ") and expected in message and "\n" not in message


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_command_prints_a_table_and_draws(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "parts.svg"
    settings = ("--set", "partition.how=label", "--set", "clouds.fast.clients=2")
    assert command("data", "partition", file, *settings, "--plot", picture) == 0
    printed, notes = capsys.readouterr()
    data = loaded(file, "partition.how=label", "clouds.fast.clients=2")
    found = partition_report.statistics(data)
    lines = printed.splitlines()
    for line, client in zip(lines[1:4], found.clients, strict=True):
        assert line.startswith(f"{client.name} ")
        assert {f"{client.rows:,}", f"{client.tokens:,}", f"{client.js_bits:.3f}"} <= set(
            line.split()
        )
    assert [client.name for client in found.clients] == ["slow", "fast 1", "fast 2"]
    assert f"tells {found.label_bits:.3f} bits about its label" in printed
    assert f"slow {len(data[0].evaluation_records)}, fast" in printed
    assert lines[-1] == str(picture) and "records left out by limit" in notes
    texts = {element.text for element in ET.parse(picture).getroot().iter()}
    assert {"slow", "fast 1", "fast 2"} <= texts


@pytest.mark.parametrize(
    ("out", "expected"), [("parts.png", "does not end in .svg"), ("no/parts.svg", "no folder")]
)
def test_a_picture_that_cannot_be_written_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, expected: str
) -> None:
    # Even before the run file, which is not there.
    assert command("data", "partition", tmp_path / "none.toml", "--plot", tmp_path / out) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_the_command_tells_of_runs_without_partition(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text()
    clouds = CLOUDS.replace(
        "compute", 'data = {sources = ["builtin:medical"], limit = 60}\ncompute'
    )
    file.write_text(text[: text.index("[partition]")] + clouds)
    assert command("data", "partition", file) == 0
    printed = capsys.readouterr().out
    # Without labels there are no distances to tell; the two clouds hold the same rows.
    groups = {group_key(record) for record in loaded(file)[0].train_records}
    assert "JS" not in printed
    assert f"shared: {len(groups)} groups have rows at more than one client" in printed
