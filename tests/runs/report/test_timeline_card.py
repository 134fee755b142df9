"""The cards of time and money: all that is shown is in the files, large runs are cut in words."""

import json
import re
from pathlib import Path

import pytest

from fedjax_llm.clouds.schedules import Decoupled, Synchronous
from fedjax_llm.runs import report
from fedjax_llm.runs.folder import (
    RunFolder,
    forecast_file,
    metrics,
    summary,
    timeline_file,
    virtual,
)
from fedjax_llm.runs.report.timeline_card import (
    COLOURS,
    MOST_CLOUDS,
    MOST_INTERVALS,
    money_card,
    most_telling,
    timeline_card,
    window,
)
from tests.runs.calendars import calendar

from .test_report import EVIL, make_run, parsed


def content(schedule, **sizes) -> dict:
    found = calendar(schedule, **sizes)
    made = timeline_file.as_json(found.timeline, [cloud.presence for cloud in found.clouds])
    return json.loads(json.dumps(made))


def test_every_activity_has_its_colour_in_the_drawing():
    found = content(Decoupled(2, 2))
    card = timeline_card(found)
    assert card is not None
    kinds = {
        k for own in found["clouds"] for lane in ("compute", "network") for _, _, k in own[lane]
    }
    assert {"trains", "sends", "receives", "lost", "down", "waits"} <= kinds
    for activity in kinds:
        assert f"fill: var(--{COLOURS[activity]})" in card.svg
        assert f">{activity}</text>" in card.svg
    assert all(own["name"] in card.svg for own in found["clouds"])
    assert [name for name, _ in card.rows] == [own["name"] for own in found["clouds"]]
    assert not re.search(r"#[0-9a-fA-F]{6}\b", card.svg)
    assert "steps" not in card.words and "Of " not in card.words


def test_of_many_clouds_the_most_telling_are_shown():
    found = content(Synchronous(), steps=3, count=60)
    shown = most_telling(found["clouds"], MOST_CLOUDS)
    assert len(shown) == MOST_CLOUDS

    def trouble(own: dict) -> float:
        seconds = own["seconds"]["compute"]
        return seconds.get("down", 0.0) + seconds.get("lost", 0.0)

    left = [own for own in found["clouds"] if own not in shown]
    assert min(map(trouble, shown)) >= max(map(trouble, left))
    card = timeline_card(found)
    assert card is not None and f"Of 60 clouds the {MOST_CLOUDS} that were down" in card.words
    assert not any(f">{own['name']}<" in card.svg for own in left)


def test_of_a_long_run_a_window_is_shown():
    found = content(Decoupled(2, 2), steps=400)
    until, steps = window(found, found["clouds"])
    lanes = [own[lane] for own in found["clouds"] for lane in ("compute", "network")]
    assert sum(start < until for lane in lanes for start, _, _ in lane) <= MOST_INTERVALS
    assert until == found["steps"][steps - 1]["ready"] < found["seconds"]
    card = timeline_card(found)
    assert card is not None and f"{steps} of 400 steps" in card.words
    short = content(Decoupled(2, 2), steps=5)
    assert window(short, short["clouds"]) == (short["seconds"], 5)


def test_a_run_without_rounds_or_prices_has_no_empty_bars():
    assert timeline_card(None) is None
    assert timeline_card({"seconds": 0.0}) is None
    assert money_card(None, None, None) is None


def test_the_forecast_stands_beside_the_outcome():
    made = virtual.of(calendar(Synchronous()), 10)
    came = forecast_file.Outcome(seconds=100.0, bytes=2_000_000, dollars=4.0, rounds=10)
    forecast = {"forecast": {"seconds": 90.0, "bytes": 2_000_000, "dollars": 5.0, "rounds": 10}}
    card = money_card(made, forecast, came)
    assert card is not None
    assert {name: ratio for name, _, _, ratio in card.compared} == {
        "seconds": "0.90", "bytes": "1.00", "dollars": "1.25", "rounds": "1.00",
    }  # fmt: skip
    assert [row.name for row in card.rows] == [*made.clouds, "server"]
    assert card.most == max(own.dollars for own in made.payers.values())
    plain = money_card(made, None, None)
    assert plain is not None and plain.compared == ()


def test_only_the_dearest_of_many_clouds_are_listed():
    made = virtual.of(calendar(Synchronous(), steps=2, count=40), 2)
    card = money_card(made, None, None)
    assert card is not None and len(card.rows) == MOST_CLOUDS + 1
    assert card.others.startswith(f"{40 - MOST_CLOUDS} cheaper clouds pay $")


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A finished run with a timeline, a bill and a forecast; its clouds have evil names."""
    folder = make_run(tmp_path / "run")
    found = calendar(Decoupled(2, 2))
    folder.write("timeline.json", json.dumps(_renamed(content(Decoupled(2, 2)))))
    records = metrics.read(folder.metrics)
    for record in records[1:]:
        record |= metrics.RoundRecord(seconds_virtual=2.0, dollars=1.5)
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = summary.summarise(records, name="quick", seed=7, virtual=virtual.of(found, 10))
    folder.write("summary.json", result.to_json())
    forecast = {"seconds": 5.0, "bytes": 10_200_000, "dollars": 1.5, "rounds": 3}
    folder.write("plan.json", json.dumps({"forecast": forecast}))
    return folder.path


def _renamed(found: dict) -> dict:
    for own in found["clouds"]:
        own["name"] = EVIL
    return found


def test_the_report_shows_time_and_money(planned: Path):
    html = report.write(RunFolder.open(planned)).read_text()
    assert "script" not in parsed(html).tags and "&lt;script&gt;" in html
    for heading in ("Timeline", "Money"):
        assert f"<h2>{heading}</h2>" in html
    charts = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", charts)
    elements = parsed(html)
    assert len(elements.ids) == len(set(elements.ids))
    light, dark = html.split("prefers-color-scheme: dark")[0:2]
    for role in set(re.findall(r"var\(--([a-z0-9-]+)\)", html)) - {"sans", "mono"}:
        assert f"--{role}:" in light and f"--{role}:" in dark
    # Two rounds of 2 seconds, $1.5 and 5.1 MB each: 1.25, 0.50 and 1.00 of them were foreseen.
    row = re.findall(r"<tr><td>(seconds|bytes|dollars|rounds)</td>.*?<td>([\d.]+)</td></tr>", html)
    assert dict(row) == {"seconds": "1.25", "bytes": "1.00", "dollars": "0.50", "rounds": "1.50"}


def test_a_run_that_has_not_ended_shows_its_plan(planned: Path):
    (planned / "summary.json").unlink()
    html = report.render(RunFolder.open(planned))
    assert "which has not ended" in html and "<h2>Money</h2>" not in html
