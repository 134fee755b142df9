"""timeline.json and the virtual part of summary.json: strict, repeatable, true to the calendar."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from fedjax_llm.clouds.schedules import Decoupled, Schedule, Streaming, Synchronous
from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import RunFolder, metrics, summary, timeline_file, virtual
from tests.runs.calendars import calendar

SCHEDULES = [Synchronous(), Streaming(2, overlap=True), Decoupled(2, 2)]


def a_folder(path: Path) -> RunFolder:
    return RunFolder.create(path, 'name = "a"\nrounds = 10\n')


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda own: own.name)
def test_the_file_says_what_the_calendar_says(schedule: Schedule, tmp_path: Path):
    found = calendar(schedule)
    with a_folder(tmp_path / "run") as folder:
        timeline_file.write(folder, found, 10)
        text = folder.timeline.read_text()
        timeline_file.write(folder, calendar(schedule), 10)
        assert folder.timeline.read_text() == text
        content = timeline_file.read(folder)
    assert "NaN" not in text and "Infinity" not in text
    assert content is not None
    assert content["seconds"] == content["until_s"] == found.timeline.seconds
    assert content["cycles_total"] == len(content["cycles"]) == len(found.timeline.table_M)
    place = content["cycle_fields"].index
    landed = {(row[place("cloud")], row[place("lands")]) for row in content["cycles"]} - {
        (cloud, 0) for cloud in range(3)
    }
    expected = {(c, s) for s in range(1, 11) for c in found.timeline.landing(s)}
    assert landed == expected
    for own in content["clouds"]:
        for lane in ("compute", "network"):
            assert all(a[1] == b[0] for a, b in pairwise(own[lane]))
            assert sum(own["seconds"][lane].values()) == pytest.approx(content["seconds"])
    assert any("down" in own["seconds"]["compute"] for own in content["clouds"])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda own: own.name)
def test_a_large_one_is_cut_and_says_so(schedule: Schedule):
    found = calendar(schedule, steps=40)
    presences = [cloud.presence for cloud in found.clouds]
    whole = timeline_file.as_json(found.timeline, presences)
    cut = timeline_file.as_json(found.timeline, presences, most_cycles=20)
    assert 0 < len(cut["cycles"]) <= 20 < cut["cycles_total"] == whole["cycles_total"]
    assert cut["until_s"] < cut["seconds"] == whole["seconds"]
    assert cut["steps"] == [s for s in whole["steps"] if s["ready"] <= cut["until_s"]]
    for short, own in zip(cut["clouds"], whole["clouds"], strict=True):
        assert short["seconds"] == own["seconds"]
        assert short["compute"][:-1] == own["compute"][: len(short["compute"]) - 1]
        assert short["compute"][-1][1] == cut["until_s"]
    assert len(json.dumps(cut)) < len(json.dumps(whole))


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{}",
        "[1]",
        '{"clouds": [{"compute": []}]}',
        '{"seconds": 1, "clouds": [], "steps": [1]}',
    ],
)
def test_a_damaged_file_is_one_clear_line(damaged: str, tmp_path: Path):
    with a_folder(tmp_path / "run") as folder:
        assert timeline_file.read(folder) is None
        folder.write("timeline.json", damaged)
        with pytest.raises(UserError, match="resume the run to write it again") as caught:
            timeline_file.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda own: own.name)
def test_the_summary_adds_up_the_bill(schedule: Schedule, tmp_path: Path):
    found = calendar(schedule)
    made = virtual.of(found, 10)
    bill = found.bill
    assert made.dollars == pytest.approx(bill.dollars)
    assert sum(own.dollars for own in made.payers.values()) == pytest.approx(made.dollars)
    assert made.server.bytes_out == sum(own.bytes_in for own in made.clouds.values())
    assert made.lost == pytest.approx(bill.lost_C.sum())
    assert 0 < made.goodput < made.goodput_up < 1
    # Steps of the bill are those of the metrics, which add up to it.
    steps = bill.clouds_NxC.sum(axis=1) + bill.server_N
    assert math.fsum(steps) == pytest.approx(made.dollars)
    result = summary.summarise([{"round": 0}], name="a", seed=0, virtual=made)
    (tmp_path / "summary.json").write_text(result.to_json())
    assert summary.read(tmp_path / "summary.json") == result


def test_a_run_that_ends_early_pays_for_what_it_did():
    found = calendar(Synchronous())
    early, whole = virtual.of(found, 4), virtual.of(found, 10)
    assert early.dollars < whole.dollars
    assert early == virtual.of(calendar(Synchronous(), steps=4), 4)


def test_dollars_of_lines_are_strict_json():
    record = metrics.RoundRecord(round=1, dollars=0.5, dollars_server=0.1)
    assert json.loads(json.dumps(metrics.strict(record), allow_nan=False)) == record
