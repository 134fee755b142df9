"""[harmonise] in a run file: what it means, what is refused, and what a run says about it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from fedjax_llm.data.harmonise import across, duplicates, identify, labels, mixing, shingles
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.runs import build, report, runfile
from fedjax_llm.runs.build import harmonising
from fedjax_llm.runs.events import Note, ignore
from fedjax_llm.runs.folder import RunFolder, harmonise_file, metrics
from fedjax_llm.runs.folder.metrics import CloudRecord, RoundRecord
from fedjax_llm.runs.report import harmonise_card
from fedjax_llm.runs.sections import harmonise as harmonise_section
from fedjax_llm.runs.sections.harmonise import HarmoniseSection

RUN_FILE = """\
name = "h"
rounds = 1

[model]
path = "."

[privacy]
unit = "{unit}"
{harmonise}
[[clouds]]
name = "one"
data = {{ sources = ["builtin:medical"] }}
{own}
[[clouds]]
name = "two"
data = {{ sources = ["builtin:finance"] }}
"""


def load(folder: Path, harmonise: str = "", own: str = "", unit: str = "none") -> runfile.RunFile:
    file = folder / "h.toml"
    file.write_text(RUN_FILE.format(harmonise=harmonise, own=own, unit=unit))
    return runfile.load(file)


def test_names_are_those_of_the_data_package() -> None:
    pairs = [
        (harmonise_section.Kind, duplicates.Kind),
        (harmonise_section.Compare, shingles.Compare),
        (harmonise_section.How, across.How),
        (harmonise_section.By, mixing.By),
        (harmonise_section.Unknown, labels.Unknown),
    ]
    for mine, theirs in pairs:
        assert get_args(mine) == get_args(theirs)
    section, likeness = HarmoniseSection(), duplicates.Likeness()
    assert (section.duplicates, section.compare) == (likeness.kind, likeness.compare)
    assert (section.threshold, section.hashes) == (likeness.threshold, likeness.hashes)


def test_without_the_section_nothing_is_done_and_with_it_what_is_harmless(tmp_path: Path) -> None:
    assert harmonising.settings(load(tmp_path)) == {"one": None, "two": None}
    found = harmonising.settings(load(tmp_path, "[harmonise]"))["one"]
    assert found is not None
    assert found.clean and found.likeness.kind == "exact"
    assert (found.labels, found.languages, found.mix) == (None, (), None)


def test_a_cloud_has_its_own_and_the_rest_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "names.toml").write_text('bad = ["bearish"]\n')
    run_file = load(
        tmp_path,
        '[harmonise]\nlanguages = ["en"]\nmin_characters = 4\nlabels = {good = [], bad = []}\n',
        'harmonise = {languages = ["de"], labels = {good = ["gut"]}, labels_file = "names.toml"}',
    )
    one, two = harmonising.settings(run_file).values()
    assert one is not None and two is not None
    assert (one.languages, two.languages) == (("de",), ("en",))
    assert one.lengths == two.lengths and one.lengths.min_characters == 4
    assert one.labels is not None and two.labels is not None
    assert [one.labels.common(name) for name in ("GUT", "bearish", "Good")] == [
        "good",
        "bad",
        "good",
    ]
    assert [two.labels.common(name) for name in ("gut", "bearish", "good")] == [None, None, "good"]
    again = tmp_path / "again.toml"
    again.write_text(runfile.to_toml(run_file))
    assert runfile.load(again) == run_file


@pytest.mark.parametrize(
    ("harmonise", "own", "message"),
    [
        ("[harmonise]\nduplicate = 1", "", "did you mean duplicates?"),
        ("[harmonise]\nthreshold = 0.5", "", 'goes with duplicates = "near"'),
        ("[harmonise]\nduplicates = 'near'\nthreshold = 1.5", "", "threshold must be"),
        ("[harmonise]\nduplicates = 'off'\nacross = 'keyed'", "", "needs duplicates"),
        ("[harmonise]\nlabels = {a = ['x'], b = ['X']}", "", "'X' stands for 'a' and for 'b'"),
        ("[harmonise]\nlabels_file = 'none.toml'", "", "labels_file: there is no"),
        ("[harmonise]\nmin_tokens = 9\nmax_tokens = 2", "", "lower min_tokens"),
        ("[harmonise]\nmix = {by = 'label'}", "", "either temperature or weights, neither"),
        ("[harmonise]\nmix = {weights = {a = 0.0}}", "", "must have one above 0"),
        ("", "harmonise = {languages = ['en']}", "goes with [harmonise]; add it"),
        ("[harmonise]\nlabels = {good = []}", "harmonise = {labels = {god = []}}", "'good'?"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(
    tmp_path: Path, harmonise: str, own: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, harmonise, own)
    text = str(error.value)
    assert message in text and "\n" not in text and "h.toml" in text


NEAR, ACROSS = 'duplicates = "near"', 'across = "private"'
REPEAT = 'duplicates = "off"\nmix = {temperature = 3.0, repeat = true}'


@pytest.mark.parametrize(
    ("unit", "settings", "sound"),
    [
        ("none", NEAR, True),
        ("none", ACROSS, True),
        ("none", REPEAT, True),
        ("example", "", True),
        ("example", "mix = {temperature = 3.0}", True),
        ("example", NEAR, False),
        ("example", ACROSS, False),
        ("example", REPEAT, False),
        ("example", 'compare = "prompt"', False),
        ("user", "", False),
        ("user", 'duplicates = "off"', True),
        ("user", NEAR, False),
        ("user", REPEAT, False),
        ("client", NEAR, True),
        ("client", REPEAT, True),
        ("client", ACROSS, False),
    ],
)
def test_what_breaks_a_guarantee_is_refused_unless_it_is_about_what_is_left(
    tmp_path: Path, unit: str, settings: str, sound: bool
) -> None:
    text = f"[harmonise]\n{settings}"
    own = ""
    if sound:
        load(tmp_path, text, own, unit)
    else:
        with pytest.raises(Refused) as error:
            load(tmp_path, text, own, unit)
        assert f'unit "{unit}"' in str(error.value) and "\n" not in str(error.value)
    after = f'{text}\nneighbours = "after"'
    if settings == REPEAT and unit in ("example", "user"):
        with pytest.raises(Refused, match="times the influence"):
            load(tmp_path, after, own, unit)
        return
    run_file = load(tmp_path, after, own, unit)
    said = harmonising.privacy_statement("Epsilon.", run_file)
    assert ("rows that harmonisation left" in said) == (unit != "none")
    assert said.startswith("Epsilon.")


def test_a_single_cloud_has_nobody_to_compare_with(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    text = RUN_FILE.format(harmonise=f"[harmonise]\n{ACROSS}", own="", unit="none")
    file.write_text(text[: text.rindex("[[clouds]]")])
    with pytest.raises(UserError, match="needs at least two clouds"):
        runfile.load(file)


def steps(*rows: tuple[str, int, dict[str, int], int]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "rows_in": rows_in,
            "dropped": dropped,
            "changed": 0,
            "added": added,
            "note": "",
            "rows_out": rows_in - sum(dropped.values()) + added,
        }
        for name, rows_in, dropped, added in rows
    ]


def test_the_book_of_a_run_is_read_back_and_damage_is_told(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", 'name = "h"') as folder:
        harmonise_file.write(folder, {})
    # A run that ended before its first round may begin again in its folder.
    with RunFolder.create(tmp_path / "run", 'name = "h"') as folder:
        folder.harmonised.unlink()
        assert harmonise_file.read(folder) is None
        assert harmonise_card.cards(None) == []
        clouds = {
            "one": steps(("length", 10, {"too long": 4}, 0), ("mixing", 6, {"left out": 1}, 3)),
            "two": steps(("length", 5, {}, 0)),
        }
        harmonise_file.write(folder, clouds)
        found = harmonise_file.read(folder)
        assert found == {"whole": None, "clouds": clouds}
        one, two = harmonise_card.cards(found)
        assert (one.rows_in, one.rows_out, one.added) == (10, 8, 3)
        assert {part.name: part.rows for part in one.parts} == {"kept": 5, "length": 4, "mixing": 1}
        for card in (one, two):
            assert sum(part.rows for part in card.parts) == card.rows_in
            assert sum(part.percent for part in card.parts) == pytest.approx(100)
        assert one.notes == (
            "length: 4 dropped (too long)",
            "mixing: 1 dropped (left out), 3 copies added",
        )
        clouds["two"][0]["rows_out"] = 4
        folder.harmonised.write_text(json.dumps({"whole": None, "clouds": clouds}))
        with pytest.raises(UserError, match="is damaged or of another version"):
            harmonise_file.read(folder)


LONG = " of the patient who came to the clinic on a cold day in March of that year"


def two_clouds(folder: Path) -> runfile.RunFile:
    """Two clouds with schemas of their own, four common rows, and one near copy in each."""
    common = [f"Question {n} about the history{LONG}?" for n in ("one", "two", "three", "four")]
    schemas = {"one": ("ask", "say"), "two": ("question", "reply")}
    for name, (ask, say) in schemas.items():
        texts = [
            f"{name} asks something of its own, number {i}: why is it {i * i}?" for i in range(9)
        ]
        texts += [*common, f"{texts[0]} "]
        rows = [{ask: text, say: "So."} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clouds = "".join(
        f"""[[clouds]]
name = "{name}"
data = {{ sources = ["{name}.jsonl"], mapping = {{ prompt = "{ask}", answer = "{say}" }} }}
"""
        for name, (ask, say) in schemas.items()
    )
    file = folder / "two.toml"
    file.write_text(
        f"""name = "two"
rounds = 1
[model]
path = "."
[training]
template = "plain"
[privacy]
unit = "none"
[harmonise]
across = "private"
{clouds}"""
    )
    return runfile.load(file)


def test_a_run_divides_common_rows_the_same_way_each_time_and_shows_it(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    run_file = two_clouds(tmp_path)
    base: Any = SimpleNamespace(tokenizer=chat_tokenizer, config=None)
    told: list[Any] = []
    corpora = build.corpora(run_file, base, told.append)
    prompts = [r.prompt for c in corpora for r in (*c.train_records, *c.evaluation_records)]
    assert len(prompts) == len(set(prompts)) == 2 * 9 + 4
    notes = [event.text for event in told if isinstance(event, Note)]
    assert any("2 of one's rows and 2 of two's are duplicates" in note for note in notes)
    # Secrets are fresh in each process; what a run trains on is not.
    again = build.corpora(run_file, base, told.append)
    assert [c.train_records for c in corpora] == [c.train_records for c in again]
    with RunFolder.create(tmp_path / "run", runfile.to_toml(run_file)) as folder:
        harmonising.record(folder, run_file, corpora)
        clouds = {name: CloudRecord(loss_eval_nats=1.0) for name in ("one", "two")}
        metrics.append(folder.metrics, RoundRecord(round=0, clouds=clouds, seconds_round=1.0))
        html = report.render(folder)
        assert "What was changed in the data, by cloud" in html
        assert "<strong>one</strong>: 14 rows read, 11 used" in html
        assert "duplicates in other clouds: 2 dropped (kept by cloud &#39;two&#39;)" in html
        folder.harmonised.unlink()
        assert "What was changed in the data" not in report.render(folder)


def test_a_cloud_with_another_tokenizer_is_refused_before_its_data_are_read(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    run_file = two_clouds(tmp_path)
    base: Any = SimpleNamespace(tokenizer=chat_tokenizer, config=None)
    for digest, sound in ((identify(chat_tokenizer).digest, True), ("0" * 64, False)):
        section = run_file.harmonise.model_copy(update={"tokenizer": digest})  # type: ignore[union-attr]
        declared = run_file.model_copy(update={"harmonise": section})
        if sound:
            assert len(build.corpora(declared, base, ignore)) == 2
        else:
            with pytest.raises(UserError, match="cloud 'one' declares tokenizer 000000000000"):
                build.corpora(declared, base, ignore)
